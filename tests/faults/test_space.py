"""A disk that is full: the old data stays as it was, and the same command goes on when there is room."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest
import torch
import yaml
from commands import run_tool
from fault_runs import assert_equal_runs, newest, run_content, train_each, write_material

from incr_ds.checkpoint.publish import read_manifest, verify_manifest
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.processes import run_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a small disk needs root to mount tmpfs"),
]
RECIPE = {
    "target": {"num_hidden_layers": 6},
    "depth": {"method": "interleave", "new": "zero-output"},
    "optimizer": "reset",
}
LARGE = 200 << 20


class Disk:
    """A tmpfs whose size can change."""

    def __init__(self, folder):
        self.folder = folder

    def resize(self, size):
        subprocess.run(["mount", "-o", f"remount,size={size}", self.folder], check=True)


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = write_material(tmp_path_factory.mktemp("space") / "material")
    drawn_model(small_architecture("llama"), torch.float32).save_pretrained(folder / "source")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(
            f"document {number}: " + "the quick brown fox jumps over it. " * 60
        )
    return folder


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.timeout(900)
@pytest.mark.parametrize("background", [False, True], ids=["foreground", "background"])
def test_training_on_a_disk_that_fills(material, tmp_path, tried, background):
    alone = {"layout": {"data_parallel": 1, "zero_stage": 1}, "growth": []}
    alone |= {"checkpoint": {"interval": 3, "keep_last": 1, "background": background}, "evaluation": None}
    schedule = {"train_steps": 9, "learning_rate": 1e-2, "warmup_steps": 2}

    def run(output):
        return run_content(material, output, schedule=schedule, **alone)

    ((error,),) = run_processes(train_each, 1, [run(tmp_path / "calm")])
    assert error is None
    one = size_of(newest(tmp_path / "calm"))
    with small_disk(tmp_path / "disk", int(1.6 * one)) as disk:  # one checkpoint fits, and not the next beside it
        output = tmp_path / "disk" / "run"
        with tried.case("training fills the disk"):
            ((error,),) = run_processes(train_each, 1, [run(output)])
            assert error is not None and "step_00000009: " in error and "o space left" in error, error
            assert newest(output).name == "step_00000003"
            verify_manifest(newest(output))
        disk.resize(LARGE)
        with tried.case("the same command with room"):
            ((error,),) = run_processes(train_each, 1, [run(output)])
            assert error is None, error
            assert_equal_runs(output, tmp_path / "calm")
            assert not list((output / "checkpoints").glob(".step_*"))
    tried.note = "two saves are left out, the last one ends the run; it goes on from the good one, bit for bit"


@pytest.mark.timeout(900)
def test_a_run_that_grows_on_a_disk_that_fills(material, tmp_path, tried):
    """The checkpoint before the growth fits, and those of the larger model do not."""
    growth = [{"at_step": 6, "recipe": str(material / "recipe.yaml"), "rewarmup_steps": 2}]
    changes = {"layout": {"data_parallel": 1, "zero_stage": 1}, "evaluation": None, "growth": growth}
    changes |= {"checkpoint": {"interval": 3, "keep_last": 1, "max_failures": 0}}
    schedule = {"train_steps": 12, "learning_rate": 1e-2, "warmup_steps": 2}

    def run(output):
        return run_content(material, output, schedule=schedule, **changes)

    ((error,),) = run_processes(train_each, 1, [run(tmp_path / "calm")])
    assert error is None
    large, small = size_of(newest(tmp_path / "calm")), size_of(tmp_path / "calm" / "data_index")
    with small_disk(tmp_path / "disk", small + int(1.25 * large)) as disk:
        output = tmp_path / "disk" / "run"
        with tried.case("the growth fills the disk"):
            ((error,),) = run_processes(train_each, 1, [run(output)])
            assert error is not None and "o space left" in error, error
            assert newest(output).name in ("step_00000003", "step_00000006"), newest(output)
            verify_manifest(newest(output))
        reached = newest(output).name
        disk.resize(LARGE)
        with tried.case("the same command with room"):
            ((error,),) = run_processes(train_each, 1, [run(output)])
            assert error is None, error
            assert_equal_runs(output, tmp_path / "calm")
            assert not list((output / "checkpoints").glob(".step_*"))
    tried.note = f"the run ended at {reached}, before or at the growth, and went on from there, bit for bit"


def tool_cases(material):
    grow = ["--source", material / "source", "--recipe", material / "recipe.yaml", "--output"]
    data = ["--input", material / "text", "--tokenizer", "train:sentencepiece", "--vocab-size", 350, "--output"]
    yield "grow_checkpoint", lambda output: ["grow_checkpoint", *grow, output]
    yield "export_huggingface", lambda output: ["export_huggingface", material / "source", output]
    yield "prepare_data", lambda output: ["prepare_data", *data, output / "text"]


@pytest.mark.timeout(900)
def test_tools_on_a_disk_that_fills(material, tmp_path, tried):
    for name, command in tool_cases(material):
        calm = tmp_path / f"calm-{name}"
        (calm.parent if name != "prepare_data" else calm).mkdir(exist_ok=True)
        done = run_tool(*map(str, command(calm)))
        assert done.returncode == 0, done.stderr
        whole = size_of(calm)
        for share in (0.05, 0.5, 0.9):
            with small_disk(tmp_path / f"{name}-{share}", max(int(share * whole), 16_384)) as disk:
                output = disk.folder / "out"
                if name == "prepare_data":
                    output.mkdir()
                with tried.case(f"{name}, {share:.0%} of the space"):
                    done = run_tool(*map(str, command(output)))
                    shown = done.stdout + done.stderr
                    assert done.returncode == 2 and "Traceback" not in shown, shown[-600:]
                    assert "o space left" in shown or "are free on its disk; nothing was written" in shown, shown[-600:]
                    assert not [path for path in output.glob("*") if not path.name.startswith(".")], list(
                        output.glob("*")
                    )
                    disk.resize(LARGE)
                    done = run_tool(*map(str, command(output)))
                    assert done.returncode == 0, done.stderr[-600:]
                    assert same_files(output, calm)
    tried.note = "nothing published, and the same command with room gives the same bytes"


def same_files(one, other):
    """The same files; of a manifest, the same list of files."""
    names = sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
    for name in names:
        if name.endswith("manifest.json"):
            files = [read_manifest((folder / name).parent)["files"] for folder in (one, other)]
            skipped = ("README.md",)  # names its own folder
            first, second = ({k: v for k, v in found.items() if k not in skipped} for found in files)
            assert first == second
        elif name.rsplit("/")[-1] not in ("README.md",) and not name.endswith("_facts.json"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    return True
