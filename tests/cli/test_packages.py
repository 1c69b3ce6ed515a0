"""Without the packages of the extras, text can be prepared, and a model grown, inspected, verified, exported, sampled."""

import json
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from token_data import write_documents

from incr_ds.data.tokenizer import train_sentencepiece
from incr_ds.errors import ConfigError
from incr_ds.launch.packages import EXTRAS, missing_package, require
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.runs import pico_run

SUPPORT = Path(__file__).parents[1] / "support"
ROOT = Path(__file__).parents[2]
PACKAGES = ("deepspeed", "megatron", "tensorboard", "matplotlib", "pyarrow", "zstandard")
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
PRELUDE = (
    f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); from absent import make_absent; make_absent(*{PACKAGES})\n"
)
IN_TURN = """
import importlib, json
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    try:
        importlib.import_module(f"incr_ds.cli.{name}").main()
    except SystemExit as ended:
        print(f"{name} ended with {ended.code or 0}", flush=True)
"""
BY_PATH = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A Hugging Face source with a tokenizer, a recipe, a data set and a run file."""
    folder = tmp_path_factory.mktemp("packages")
    architecture = small_architecture("llama", vocab_size=400)
    train_sentencepiece([(ROOT / "README.md").read_text(), (ROOT / "LICENSE").read_text()], 400, folder / "source")
    drawn_model(architecture).float().save_pretrained(folder / "source")
    recipe = {"target": {"num_hidden_layers": 5}, "optimizer": "reset"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_documents(folder / "x", [[1, 2, 3]])
    (folder / "config.json").write_text(json.dumps(dict(architecture.config)))
    run = pico_run(
        output=str(folder / "run"),
        model={"config": str(folder / "config.json")},
        data={"train": [{"prefix": str(folder / "x")}]},
    )
    (folder / "run.yaml").write_text(json.dumps(run.model_dump(mode="json")))
    return folder


def without(program, *arguments, **environment):
    command = [sys.executable, "-c", PRELUDE + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PATH": "/usr/bin", **environment})


def in_turn(*commands):
    return without(IN_TURN, json.dumps([[str(word) for word in command] for command in commands]))


def test_the_offline_commands_need_none_of_them(home, tmp_path: Path):
    grown, exported = tmp_path / "grown", tmp_path / "exported"
    done = in_turn(
        ["grow_checkpoint", "--source", home / "source", "--recipe", home / "recipe.yaml", "--output", grown],
        ["inspect_checkpoint", grown],
        ["verify_checkpoint", grown, "--against", home / "source"],
        ["export_huggingface", grown, exported],
        ["inspect_checkpoint", "diff", grown, grown],
        ["generate", exported, "--prompt", "The license", "--tokens", "2", "--tokenizer", home / "source"],
        [
            "prepare_data",
            "--input",
            home / "recipe.yaml",
            "--tokenizer",
            home / "source",
            "--output",
            tmp_path / "data",
            "--held-out",
            "0",
        ],
    )
    assert done.returncode == 0 and not done.stderr.strip(), done
    ended = [line for line in done.stdout.splitlines() if " ended with " in line]
    names = ("grow_checkpoint", "inspect_checkpoint", "verify_checkpoint", "export_huggingface", "inspect_checkpoint")
    assert ended == [f"{name} ended with 0" for name in (*names, "generate", "prepare_data")], done.stdout
    assert "logits kept" in done.stdout and (exported / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("command", "packages"),
    [
        ("evaluate SOURCE --data HOME/x", "megatron-core is"),
        ("fit_growth --config HOME/run.yaml --output OUT", "deepspeed and megatron-core are"),
        ("growth_study --source HOME --grown HOME --scratch HOME --output OUT", "matplotlib is"),
        ("verify_checkpoint SOURCE --against SOURCE --data HOME/x", "megatron-core is"),
    ],
)
def test_a_command_that_needs_one_says_what_to_install(home, tmp_path: Path, command, packages):
    words = {"SOURCE": str(home / "source"), "OUT": str(tmp_path / "out"), "HOME": str(home)}
    for word, path in words.items():
        command = command.replace(word, path)
    done = in_turn(command.split())
    assert done.stderr == f"error: {packages} not installed; run pip install 'incr_ds[train]'.\n"
    assert done.stdout == f"{command.split()[0]} ended with 2\n" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "package"), [("x.jsonl.zst", "zstandard"), ("x.parquet", "pyarrow")])
def test_a_kind_of_file_that_needs_one_says_what_to_install(home, tmp_path: Path, name, package):
    (tmp_path / name).write_bytes(b"")
    words = ["--input", tmp_path / name, "--tokenizer", home / "source", "--output", tmp_path / "out"]
    done = in_turn(["prepare_data", *words])
    assert done.stderr == f"error: {package} is not installed; run pip install 'incr_ds[data]'.\n"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_training_says_what_to_install(home):
    done = without(BY_PATH, ROOT / "launchers" / "pretrain.py", "--config", home / "run.yaml", **LAUNCHED)
    packages = "deepspeed and megatron-core and tensorboard are"
    assert done.stderr == f"pretrain: {packages} not installed; run pip install 'incr_ds[train]'.\n"
    assert done.returncode == 2 and not (home / "run").exists()


def test_what_is_installed_is_not_asked_for():
    for modules in EXTRAS.values():
        require(*modules)
    with pytest.raises(ConfigError, match=r"^tensorboard is not installed; run pip install 'incr_ds\[train\]'\.$"):
        raise missing_package(ModuleNotFoundError("", name="tensorboard.compat"))
    assert missing_package(ModuleNotFoundError("", name="torch")) is None


def test_the_extras_have_these_packages_and_nothing_else_needs_them():
    """Each package is in its extra only, and not in every installation."""
    found = {}
    for text in requires("incr_ds"):
        requirement = Requirement(text)
        names = [name for name in EXTRAS if requirement.marker and requirement.marker.evaluate({"extra": name})]
        everywhere = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        found.setdefault("" if everywhere else names[0] if names else "dev", set()).add(requirement.name)
    for extra, modules in EXTRAS.items():
        assert found[extra] == set(modules.values()) and not found[""] & found[extra]
