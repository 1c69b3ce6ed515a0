"""Mistakes on any tool's command line: one screen of text, exit code 2, no traceback, nothing written."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from commands import run_tool
from curves import write_run
from sources import write_synthetic

from incr_ds.checkpoint.publish import check_writable
from incr_ds.cli.command import MOST_LINES, error_text
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.testing.pico import pico_architecture

LONG = "x" * 5000


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    """A source, a recipe, a text, and three runs."""
    folder = tmp_path_factory.mktemp("console")
    write_synthetic(folder, pico_architecture(num_hidden_layers=1, vocab_size=11))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"target": {"num_hidden_layers": 2}}))
    (folder / "text").mkdir()
    for number in range(40):
        words = " ".join(f"{hash((number, place)) % 10**9:x}" for place in range(50))
        (folder / "text" / f"{number}.txt").write_text(words)
    for run in ("source", "grown", "scratch"):
        write_run(folder / "runs" / run, [8.0, 5.0], 1e6)
    return folder


def tools(home, output):
    """A command line of each tool that would succeed."""
    grow = ["grow_checkpoint", "--source", home / "source", "--recipe", home / "recipe.yaml", "--output", output]
    export = ["export_huggingface", home / "source", output]
    prepare = ["prepare_data", "--input", home / "text", "--tokenizer", "train:sentencepiece", "--vocab-size", "320"]
    study = [
        "growth_study",
        *(part for run in ("source", "grown", "scratch") for part in (f"--{run}", home / "runs" / run)),
    ]
    return {
        "grow": grow,
        "export": export,
        "prepare": [*prepare, "--output", output],
        "study": [*study, "--output", output],
    }


def refused(*arguments):
    done = run_tool(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done
    assert len(done.stderr.splitlines()) <= MOST_LINES + 1 and len(done.stderr) < 50_000
    return done.stderr


WORKING = ["grow", "export", "prepare", "study"]


@pytest.mark.parametrize("name", WORKING)
def test_the_same_commands_work(home, tmp_path: Path, name):
    assert run_tool(*tools(home, tmp_path / "out")[name]).returncode == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


OUTPUTS = {
    "in a file": (
        lambda folder: folder / "file" / "out",
        r"(Not a directory|a part of the path is a file|File exists)",
    ),
    "under proc": (lambda folder: "/proc/out", r"No such file or directory"),
    "of 5,000 characters": (lambda folder: folder / LONG, r"File name too long"),
    "in the dark": (lambda folder: folder / "dangling" / "out", r"(File exists|No such file|Not a directory)"),
}


@pytest.mark.parametrize("where", OUTPUTS)
@pytest.mark.parametrize("name", WORKING)
def test_an_output_that_cannot_be_is_one_message(home, tmp_path: Path, name, where):
    (tmp_path / "file").write_text("content")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "else")
    make, message = OUTPUTS[where]
    text = refused(*tools(home, make(tmp_path))[name])
    assert any(part in text for part in message.strip("()").split("|")), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_is_one_message(home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name, number):
    """The write fails where the kernel would let it fail: at every fsync, replace and savefig."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    for place in ("os.fsync", "os.replace", "os.rename"):
        monkeypatch.setattr(place, fail)
    text = refused(*tools(home, tmp_path / "out")[name])
    assert os.strerror(number) in text
    assert name in ("study", "grow", "prepare") or not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify_checkpoint", "SOURCE", "--tag", ""], r"error: --tag: expected a value, found nothing"),
        (["verify_checkpoint", "SOURCE", "--tag="], r"error: --tag: expected a value, found nothing"),
        (["inspect_checkpoint", ""], r"error: argument: expected a value, found nothing"),
        (["verify_checkpoint", "SOURCE", "--tolerance", "nan"], r"Invalid value"),
        (["verify_checkpoint", "SOURCE", "--tolerance", "inf"], r"error: --tolerance inf: expected a finite number"),
        (["verify_checkpoint", "SOURCE", "--tolerance", "-1"], r"Invalid value"),
        (["verify_checkpoint", "SOURCE", "--tag", LONG], r"File name too long"),
        (["inspect_checkpoint", LONG], r"File name too long"),
        (["prepare_data", "--input", LONG, "--tokenizer", "x", "--output", "y"], r"File name too long"),
        (["evaluate", "SOURCE", "--data", LONG], r"File name too long"),
        (
            ["grow_checkpoint", "--source", "SOURCE", "--suggest", "1e9", "--layout", "²x1x1"],
            r"error: --layout ²x1x1: exp",
        ),
        (
            ["grow_checkpoint", "--source", "SOURCE", "--suggest", "nan"],
            r"error: --suggest nan: expected a number of par",
        ),
        (["grow_checkpoint", "--source", "SOURCE", "--suggest", "9" * 5000], r"error: --suggest 999"),
        (["grow_checkpoint", "--source", "a", "--source", "b"], r"error: --source: given 2 times; it takes one value"),
        (["growth_study", "--grown", "a", "--grown=b"], r"error: --grown: given 2 times; it takes one value"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_value_that_no_option_has_is_named(home, arguments, message: str):
    text = refused(*(str(home / "source") if part == "SOURCE" else part for part in arguments))
    assert message in text


def test_what_may_be_repeated_still_may(home, tmp_path: Path):
    more = ["--input", home / "recipe.yaml"]
    assert run_tool(*tools(home, tmp_path / "out")["prepare"], *more).returncode == 0


@pytest.mark.parametrize("name", ["proof", "growth", "model"])
def test_a_study_whose_extras_are_missing_writes_nothing(home, tmp_path: Path, name):
    refused(*tools(home, tmp_path / "out")["study"], f"--{name}", tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_could_not_be_written_is_said_before_the_fit(home, tmp_path: Path):
    run = tmp_path / "run.yaml"
    (tmp_path / "file").write_text("")
    run.write_text("output: x\n")
    text = refused("fit_growth", "--config", run, "--output", tmp_path / "file" / "recipe.yaml")
    assert "a part of the path is a file" in text and "nothing was done" in text


def test_a_full_disk_behind_the_output_is_said_once():
    """As `tool > /full/disk/file`; Python would add a second complaint at its end."""
    tool = Path(__file__).parents[2] / "tools" / "grow_checkpoint.py"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, tool, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device; free some space, or choose another output\n"


def test_an_error_is_at_most_a_screen_and_no_escape_sequence():
    lines = error_text(ConfigError("\n".join(f"line {number}" for number in range(500)))).splitlines()
    assert len(lines) == MOST_LINES + 1 and lines[-1] == "... and 460 more lines"
    assert error_text(CheckpointError("\x1b[31mred\x07")) == "\\x1b[31mred\\x07"
    assert error_text(ConfigError("y" * 9000)).count("y") == 200 and "8,800 characters" in error_text(
        ConfigError("y" * 9000)
    )
    assert error_text(ConfigError("y " * 9000)).count("y") == 500
    assert error_text(FileNotFoundError(errno.ENOENT, "No such file", "a")) == "a: No such file"
    assert error_text(OSError("burnt")) == "burnt"


def test_a_folder_is_writable_or_it_is_said_why(tmp_path: Path):
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for folder, why in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "x", "is a file"),
        (tmp_path / LONG, "too long"),
    ):
        with pytest.raises(
            CheckpointError, match=rf"cannot be written \(.*{why}.*nothing was done. Choose another output"
        ):
            check_writable(folder)


def test_json_of_a_tool_is_json(home):
    assert json.loads(run_tool("inspect_checkpoint", home / "source", "--json").stdout)["family"] == "llama"
