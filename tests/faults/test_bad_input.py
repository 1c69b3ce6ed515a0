"""Generated mistakes in run files, recipes and command lines: exit 2, one screen, the key, no traceback, nothing written."""

import copy
import importlib.util
import random
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml
from commands import Done, run_tool
from fault_runs import run_content, write_material

from incr_ds.testing.memory import drawn_model, small_architecture

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
MOST_LINES = 45
JUNK = [
    None,
    "often",
    "",
    -1,
    0,
    1.5,
    10**30,
    [],
    [1, "a"],
    {"a": 1},
    True,
    "\x07",
    "../../etc",
    float("nan"),
    float("inf"),
]
RECIPE = {
    "target": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4},
    "width": {"hidden": "isometric", "ffn": {"new": "zero-output"}, "heads": {"new": "copy"}},
    "depth": {"method": "interleave", "new": "zero-output"},
    "optimizer": "reset",
    "layout": {
        "format": "deepspeed",
        "tensor_parallel": 1,
        "pipeline_parallel": 1,
        "data_parallel": 1,
        "zero_stage": 1,
    },
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = write_material(tmp_path_factory.mktemp("bad") / "material")
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(folder / "source")
    return folder


def pretrain(*arguments):
    """launchers/pretrain.py in this process, as far as it gets without a launcher."""
    spec = importlib.util.spec_from_file_location("pretrain_launcher", ROOT / "launchers" / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out, err = StringIO(), StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
        try:
            module.app()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return Done(code, out.getvalue(), err.getvalue())


def leaves(content, path=()):
    """Every key of a nested mapping, with its path."""
    for key, value in content.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


def broken(content, draw):
    """A copy with one key changed, removed, or misspelt. Returns it with the path of that key."""
    content = copy.deepcopy(content)
    path = draw.choice(list(leaves(content)))
    section = content
    for name in path[:-1]:
        section = section[name]
    kind = draw.choice(["junk", "junk", "junk", "misspelt", "another"])
    if kind == "junk":
        section[path[-1]] = draw.choice([junk for junk in JUNK if junk != section[path[-1]]])
    elif kind == "misspelt":
        section[path[-1] + "s"] = section.pop(path[-1])
        path = (*path[:-1], path[-1] + "s")
    else:
        section["zzz"] = 1
        path = (*path[:-1], "zzz")
    return content, path


def check(done, folder, before, *words):
    shown = done.stderr or done.stdout
    assert done.returncode == 2, (done.returncode, shown[-500:])
    assert "Traceback" not in done.stdout + done.stderr and 0 < len(shown.splitlines()) <= MOST_LINES, shown[-500:]
    assert any(word in shown for word in words), (words, shown[-500:])
    assert files(folder) == before, files(folder) - before


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def is_valid(content):
    """Whether a change is a mistake or only another valid value: true for the latter."""
    from incr_ds.config.fields import parse_settings
    from incr_ds.config.training import RunSettings
    from incr_ds.errors import ConfigError

    try:
        parse_settings(content, RunSettings, "")
    except ConfigError:
        return False
    return True


@pytest.mark.timeout(1200)
def test_bad_run_files(material, tmp_path, tried):
    draw, count = random.Random(5), 80
    good = run_content(material, tmp_path / "run")
    while tried.tried < count:
        content, path = broken(good, draw)
        if is_valid(content):
            continue
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(content))
        before = files(tmp_path)
        with tried.case(f"{'.'.join(path)}: {content}"):
            check(pretrain("--config", file, "--print-config"), tmp_path, before, path[-1], path[0])
    tried.note = "one key changed, misspelt or added; the message names it"


@pytest.mark.timeout(1200)
def test_bad_recipes(material, tmp_path, tried):
    draw, count, passed_over = random.Random(7), 60, 0
    while tried.tried < count:
        content, path = broken(RECIPE, draw)
        file, output = tmp_path / "recipe.yaml", tmp_path / "grown"
        file.write_text(yaml.safe_dump(content))
        before = files(tmp_path)
        done = run_tool(
            "grow_checkpoint", "--source", material / "source", "--recipe", file, "--output", output, "--plan-only"
        )
        if done.returncode == 0:  # the changed value is a valid one
            passed_over += 1
            assert passed_over < 200
            continue
        with tried.case(f"{'.'.join(path)}: {content}"):
            check(done, tmp_path, before, path[-1], path[0], str(file))
    tried.note = "one key changed, misspelt or added; the message names it"


COMMANDS = [
    ("grow_checkpoint", "--source", "{gone}", "--recipe", "{recipe}", "--output", "{out}"),
    ("grow_checkpoint", "--source", "{source}", "--recipe", "{gone}", "--output", "{out}"),
    ("grow_checkpoint", "--source", "{source}", "--recipe", "{source}", "--output", "{out}"),
    ("grow_checkpoint", "--source", "{source}", "--recipe", "{recipe}", "--output", "/proc/grown"),
    ("grow_checkpoint", "--source", "{source}", "--recipe", "{recipe}", "--output", "{source}/inside"),
    ("grow_checkpoint", "--source", "{source}", "--recipe", "{recipe}", "--output", "{out}", "--workers", "-1"),
    ("grow_checkpoint", "--source", "{source}", "--recipe", "{recipe}", "--output", "{out}", "--tag", "absent"),
    ("grow_checkpoint", "--source", "{source}", "--recipe", "{recipe}", "--output", "{out}", "--memory-budget", "lots"),
    ("grow_checkpoint", "--source", "{source}"),
    ("grow_checkpoint", "--sauce", "{source}"),
    ("inspect_checkpoint", "{gone}"),
    ("inspect_checkpoint", "{recipe}"),
    ("inspect_checkpoint", "{empty}"),
    ("inspect_checkpoint",),
    ("verify_checkpoint", "{gone}"),
    ("verify_checkpoint", "{source}", "--against", "{gone}"),
    ("verify_checkpoint", "{source}", "--tolerance", "nan"),
    ("verify_checkpoint", "{source}", "--tolerance", "-1"),
    ("export_huggingface", "{gone}", "{out}"),
    ("export_huggingface", "{source}", "{source}"),
    ("export_huggingface", "{empty}", "{out}"),
    ("generate", "{gone}", "--prompt", "a"),
    ("generate", "{source}", "--prompt", "a", "--max-new-tokens", "-5"),
    ("evaluate", "{gone}"),
    ("evaluate", "{source}"),
    ("evaluate", "{source}", "--text", "{gone}"),
    ("fit_growth", "--source", "{gone}", "--recipe", "{recipe}", "--output", "{out}"),
    ("growth_study", "--config", "{gone}"),
    ("growth_study", "--config", "{recipe}"),
    ("growth_study",),
    ("plan_growth", "--source", "{gone}", "--flops", "1e15"),
    ("plan_growth", "--flops", "-1"),
    ("prepare_data", "--input", "{gone}", "--tokenizer", "train:sentencepiece", "--output", "{out}"),
    ("prepare_data", "--input", "{empty}", "--tokenizer", "train:sentencepiece", "--output", "{out}"),
    ("prepare_data", "--input", "{recipe}", "--tokenizer", "{gone}", "--output", "{out}"),
    (
        "prepare_data",
        "--input",
        "{recipe}",
        "--tokenizer",
        "train:sentencepiece",
        "--output",
        "{out}",
        "--held-out",
        "2",
    ),
    ("prepare_data", "--input", "{recipe}", "--tokenizer", "train:other", "--output", "{out}"),
    ("report", "{gone}"),
    ("report", "{empty}"),
    ("report",),
    ("write_sbatch", "{gone}"),
    ("write_sbatch", "{recipe}"),
    ("pretrain", "--config", "{gone}"),
    ("pretrain", "--config", "{empty}"),
    ("pretrain", "--config", "{run}", "--set", "seed=["),
    ("pretrain", "--config", "{run}", "--set", "seed"),
    ("pretrain", "--config", "{run}", "--set", "=3"),
    ("pretrain", "--config", "{run}", "--set", "seed=-1"),
    ("pretrain", "--config", "{run}", "--set", "output=/proc/run"),
    ("pretrain", "--config", "{run}", "--json"),
    ("pretrain", "--config", "{run}", "--dry-run", "--print-config"),
    ("pretrain", "--config", "{run}", "--mfu", "0.4"),
    ("pretrain", "--config", "{run}", "--dry-run", "--mfu", "7"),
    ("pretrain", "--config", "{run}", "--set", "layout.tensor_parallel=64", "--print-config"),
    ("pretrain", "--config", "{run}", "--set", "model.config={gone}", "--print-config"),
    ("pretrain", "--config", "{run}", "--set", "batch.global_batch_size=7", "--print-config"),
    ("pretrain", "--config", "{run}", "--set", "schedule.decay=sinus", "--print-config"),
    ("pretrain", "--config", "{run}", "--set", "distillation={ teacher: before-growth}", "--print-config"),
    ("pretrain", "--config", "{run}"),
    ("pretrain",),
]


@pytest.mark.timeout(1200)
def test_bad_command_lines(material, tmp_path, tried):
    places = {
        "source": material / "source",
        "gone": tmp_path / "gone",
        "empty": tmp_path / "empty",
        "out": tmp_path / "out",
    }
    places |= {"recipe": tmp_path / "recipe.yaml", "run": tmp_path / "run.yaml"}
    places["empty"].mkdir()
    places["recipe"].write_text(yaml.safe_dump(RECIPE))
    places["run"].write_text(yaml.safe_dump(run_content(material, tmp_path / "run")))
    for name, *arguments in COMMANDS:
        words = [re.sub(r"\{(\w+)\}", lambda found: str(places[found[1]]), argument) for argument in arguments]
        before = files(tmp_path) | files(material)
        with tried.case(f"{name} {' '.join(words)}"):
            done = pretrain(*words) if name == "pretrain" else run_tool(name, *words)
            shown = done.stdout + done.stderr
            assert done.returncode == 2, (done.returncode, shown[-500:])
            assert "Traceback" not in shown and 0 < len((done.stderr or shown).splitlines()) <= MOST_LINES, shown[-800:]
            assert files(tmp_path) | files(material) == before
    tried.note = "missing files, wrong values, options that do not go together"
