"""A loaded checkpoint decides weights, masters, moments and steps, but never settings or which code runs."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from resuming_engines import load_own

from incr_ds.errors import IncrError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.runs import pico_run
from incr_ds.train.checkpoints import TrainingState, save_checkpoint
from incr_ds.train.metrics import Position

MODEL = small_architecture("llama", tie_word_embeddings=False, num_key_value_heads=2)
CLIPPING = 0.05  # every gradient norm of these runs is above it
DATA_2 = {"data_parallel": 2}
SAVED, STEPS = 2, 4


def run_of(output, layout, clipping, precision="fp32"):
    return pico_run(
        output=str(output),
        precision=precision,
        layout=layout,
        batch={"sequence_length": 12, "micro_batch_size": 2, "global_batch_size": 4},
        optimizer={"gradient_clipping": clipping},
    )


def built(run):
    from incr_ds.train.engine import build_engine

    return build_engine(run, MODEL, None, None)


def trained(engine, run, numbers):
    """(loss, gradient norm) of each step."""
    found = []
    for number in numbers:
        ids = torch.randint(0, 101, (2, 2, 13), generator=torch.Generator().manual_seed(number))
        mine = ids[engine.data_parallel_rank :: run.layout.data_parallel]
        batches = iter([(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in mine])
        result = engine.train_step(batches if engine.reads_data else iter(()), learning_rate=0.01)
        found.append((result.loss, result.gradient_norm))
    return found


def train_and_save(output, layout, clipping, precision="fp32", rest=None):
    """Steps of a run that saves after SAVED of them; with ``rest`` the threshold is another one from there on."""
    run = run_of(output, layout, clipping, precision)
    engine = built(run)
    found = trained(engine, run, range(SAVED))
    state = TrainingState(
        position=Position(step=SAVED), evaluated_step=-1, data={}, settings=run.model_dump(mode="json")
    )
    save_checkpoint(engine, run, MODEL, state)
    if rest is not None:
        engine._engine.optimizer.clip_grad = rest
    found += trained(engine, run, range(SAVED, STEPS))
    engine.close()
    return found


def load_and_train(folder, output, layout, clipping, precision="fp32", own=False):
    """Steps after loading a published folder; ``own``: as the run that wrote it resumes."""
    run = run_of(output, layout, clipping, precision)
    engine = built(run)
    if own:
        load_own(engine, run, Path(folder), MODEL)
    else:
        engine.load(Path(folder), (Path(folder) / "latest").read_text())
    assert torch.load.__module__ == "torch.serialization"  # only DeepSpeed's loading had another
    found = trained(engine, run, range(SAVED, STEPS))
    engine.close()
    return found


def re_laid(source, folder, layout):
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"target": {}, "layout": layout}))
    grow_checkpoint(plan_request(GrowthRequest(source, recipe, folder / "re-laid")))
    return folder / "re-laid"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of two data ranks, and the losses and norms of the run that wrote it."""
    folder = tmp_path_factory.mktemp("source")
    steps = run_processes(train_and_save, 2, folder / "run", DATA_2, CLIPPING)[0]
    assert min(norm for _, norm in steps) > 4 * CLIPPING
    return folder / "run" / "checkpoints" / "step_00000002", steps


LAYOUTS = {
    "pipeline of 2": {"pipeline_parallel": 2},
    "ZeRO-3": {"data_parallel": 2, "zero_stage": 3},
    "ZeRO-2": {"data_parallel": 2, "zero_stage": 2},
    "tensor 2": {"tensor_parallel": 2},
}
BY_DEFAULT = ("pipeline of 2",)


@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_a_re_laid_checkpoint_goes_on_with_the_gradient_clipping_of_the_run_file(source, tmp_path, name):
    folder, steps = source
    layout = LAYOUTS[name]
    stored = re_laid(folder, tmp_path, layout)
    found = run_processes(load_and_train, 2, stored, tmp_path / "run", layout, CLIPPING)[0]
    for (loss, norm), (expected, expected_norm) in zip(found, steps[SAVED:], strict=True):
        assert loss == pytest.approx(expected, rel=1e-6) and norm == pytest.approx(expected_norm, rel=1e-5)


CHANGED = [
    pytest.param(DATA_2, "fp32", id="ZeRO-1"),
    pytest.param({"data_parallel": 2, "zero_stage": 3}, "bf16", id="ZeRO-3, bf16", marks=pytest.mark.slow),
    pytest.param({"pipeline_parallel": 2}, "bf16", id="pipeline, bf16", marks=pytest.mark.slow),
    pytest.param({"data_parallel": 2, "zero_stage": 2}, "fp32", id="ZeRO-2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("layout", "precision"), CHANGED)
def test_a_changed_gradient_clipping_is_followed_on_resume(tmp_path, layout, precision):
    whole = run_processes(train_and_save, 2, tmp_path, layout, 10.0, precision, CLIPPING)[0]
    folder = tmp_path / "checkpoints" / "step_00000002"
    found = run_processes(load_and_train, 2, folder, tmp_path, layout, CLIPPING, precision, True)[0]
    assert found == whole[SAVED:]


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def messages_of_hostile_files(folder, output, layout, patterns, canary):
    """The result of loading, by pattern of the files that hold a payload."""
    run, rank = run_of(output, layout, 1.0), int(os.environ["RANK"])
    engine = built(run)
    found = {}
    tag = (Path(folder) / "latest").read_text()
    for pattern in patterns:
        changed = Path(output) / f"{pattern.strip('*_.')}-{rank}"
        shutil.copytree(folder, changed)
        for path in (changed / tag).glob(pattern):
            content = torch.load(path, weights_only=False)
            torch.save({**content, "extra": Payload(canary)}, path)
        try:
            engine.load(changed, tag)
        except IncrError as error:
            found[pattern] = str(error)
    engine.close()
    return found


HOSTILE = [
    ({"pipeline_parallel": 2}, ("layer_*", "mp_rank_*", "*_optim_states.pt")),
    ({"data_parallel": 2, "zero_stage": 3}, ("zero_pp_rank_1_mp_rank_00_model_states.pt", "*_optim_states.pt")),
]


@pytest.mark.parametrize(("layout", "patterns"), HOSTILE, ids=["pipeline", "ZeRO-3"])
def test_no_code_of_a_checkpoint_runs_when_training_loads_it(tmp_path, layout, patterns):
    run_processes(train_and_save, 2, tmp_path / "run", layout, 1.0)
    folder, canary = tmp_path / "run" / "checkpoints" / "step_00000002", tmp_path / "canary"
    for found in run_processes(
        messages_of_hostile_files, 2, folder, tmp_path / "hostile", layout, patterns, str(canary)
    ):
        assert set(found) == set(patterns), "a hostile file was loaded"
        for pattern, message in found.items():
            assert "posix.system; loading it would run code from the checkpoint, so it was refused" in message
            assert Path(message.split(": refers to")[0].split(": ")[-1]).match(pattern), message
    assert not canary.exists()
