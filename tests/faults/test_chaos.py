"""The whole path in random topologies, with kills: grow, train, resume, reshard, train, export. It ends like a calm run."""

import random
import shutil

import pytest
import torch
import yaml
from commands import run_tool
from fault_runs import RECIPE, Started, newest, run_content, write_material
from transformers import AutoModelForCausalLM

from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.train.metrics import FILE, read_metrics

pytestmark = pytest.mark.slow
CHAINS = 5
HALF, END = 8, 16
# Of the model with 6 heads, 3 key-value heads and 4 layers; at most 4 ranks.
LAYOUTS = (
    {"data_parallel": 1, "zero_stage": 1},
    {"data_parallel": 2, "zero_stage": 1},
    {"data_parallel": 2, "zero_stage": 2},
    {"data_parallel": 2, "zero_stage": 3},
    {"data_parallel": 4, "zero_stage": 3},
    {"pipeline_parallel": 2, "zero_stage": 1},
    {"pipeline_parallel": 2, "data_parallel": 2, "zero_stage": 1},
    {"tensor_parallel": 3, "zero_stage": 1},
)


def ranks(layout):
    degrees = ("data_parallel", "tensor_parallel", "pipeline_parallel")
    return torch.Size([layout.get(degree, 1) for degree in degrees]).numel()


def grow(world, name, layout):
    """The source, grown into a layout, as the command line does it."""
    recipe = world / f"{name}.recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "layout": layout, "optimizer": "reset"}))
    done = run_tool("grow_checkpoint", "--source", world / "source", "--recipe", recipe, "--output", world / name)
    assert done.returncode == 0, done.stderr
    return world / name


def write(world, name, start, layout, steps):
    """The run file up to ``steps``: of the same output for every layout."""
    content = run_content(world / "material", world / name, layout=layout, growth=[], evaluation=None)
    content |= {"model": {"initialize_from": str(start)}, "resume": {"reshard": True}}
    content["schedule"] = {"train_steps": END, "end_step": steps, "learning_rate": 1e-3, "warmup_steps": 2}
    path = world / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def train(run_file, layout, output, kill_at=None):
    """Train to the end of the run file, killed on the way after step ``kill_at`` if one is given. Returns the kills."""
    if kill_at is not None:
        run = Started(run_file, ranks(layout))
        assert run.wait_for(lambda: last_step(output) >= kill_at, 240), run.log.read_text()[-3000:]
        run.kill_all()
        run.close()
    run = Started(run_file, ranks(layout))
    assert run.end() == 0, run.log.read_text()[-3000:]
    return 0 if kill_at is None else 1


def last_step(output):
    path = output / FILE
    return max((row["step"] for row in read_metrics(path)), default=0) if path.exists() else 0


def exported_loss(world, name):
    """The loss of the exported model on fixed tokens, as transformers computes it in fp64."""
    done = run_tool("export_huggingface", newest(world / name), world / f"{name}-exported")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(world / f"{name}-exported", dtype=torch.float64)
    tokens = torch.randint(0, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()


def losses(world, name):
    return [row["loss"] for row in read_metrics(world / name / FILE) if row["kind"] == "train"]


@pytest.mark.timeout(3600)
def test_chaos(tmp_path, tried):
    write_material(tmp_path / "material")
    drawn_model(small_architecture("llama", num_hidden_layers=2), torch.float32).save_pretrained(tmp_path / "source")
    calm = LAYOUTS[0]
    train(write(tmp_path, "calm", grow(tmp_path, "calm-grown", calm), calm, END), calm, tmp_path / "calm")
    expected, curve = exported_loss(tmp_path, "calm"), losses(tmp_path, "calm")
    draw, worst, kills = random.Random(11), 0.0, 0
    for number in range(CHAINS):
        name, (first, second) = f"chain{number}", draw.sample(LAYOUTS[1:], 2)
        start = grow(tmp_path, f"{name}-grown", first)
        with tried.case(f"{first}, then {second}"):
            output = tmp_path / name
            kills += train(write(tmp_path, name, start, first, HALF), first, output, draw.randrange(1, HALF))
            kills += train(write(tmp_path, name, start, second, END), second, output, draw.randrange(HALF + 1, END))
            assert len(losses(tmp_path, name)) == len(curve)
            apart = [one / other - 1 for one, other in zip(losses(tmp_path, name), curve, strict=True)]
            apart.append(exported_loss(tmp_path, name) / expected - 1)
            worst = max(worst, *map(abs, apart))
            assert worst <= 1e-5, apart
        shutil.rmtree(output)
    tried.note = (
        f"grow, train, kill, resume, reshard, train, kill, resume, export; {kills} kills; every loss of the curve and that of "
        f"the exported model within {worst:.0e} of a calm run on one rank"
    )
