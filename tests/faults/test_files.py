"""Files of a run that change behind its back: each is named, or the run goes on from what is whole."""

import random
import shutil
from pathlib import Path

import pytest
from fault_runs import assert_equal_runs, curve, run_content, states, train_each, write_material

from incr_ds.testing.processes import run_processes

pytestmark = pytest.mark.slow
FIRST, LAST = 6, 9  # steps before the damage, and in all


def content_of(material, output, steps):
    alone = {
        "layout": {"data_parallel": 1, "zero_stage": 1},
        "growth": [],
        "checkpoint": {"interval": 3, "keep_last": 0},
    }
    schedule = {"train_steps": LAST, "end_step": steps, "learning_rate": 1e-2, "warmup_steps": 2}
    return run_content(material, output, schedule=schedule, evaluation={"interval": 3, "samples": 8}, **alone)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run of FIRST steps, and what LAST steps give."""
    folder = tmp_path_factory.mktemp("files")
    material = write_material(folder / "material")
    (errors,) = run_processes(
        train_each, 1, [content_of(material, folder / name, n) for name, n in (("base", FIRST), ("whole", LAST))]
    )
    assert errors == [None, None]
    return folder


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def delete(path):
    path.unlink()


def fill(path):
    path.write_bytes(random.Random(3).randbytes(path.stat().st_size))


DAMAGES = (flip, truncate, empty, delete, fill)


def disturbed(world, name, damage, label=""):
    """A copy of the run with one file damaged, or the run's data with one file damaged while it trains.

    Returns the run's content, and the copy.
    """
    copy = world / "copies" / f"{label}{name.replace('/', '-')}-{damage.__name__}"
    shutil.copytree(world / "base", copy / "base")
    if name.startswith("base/"):
        damage(copy / name)
    return content_of(world / "material", copy / "base", LAST), copy


def cases_of(world, place):
    root = world / place
    return [str(path.relative_to(world)) for path in sorted(root.rglob("*")) if path.is_file()]


def outcomes(world, names):
    cases = [(name, damage, *disturbed(world, name, damage)) for name in names for damage in DAMAGES]
    runs = [content for _, _, content, _ in cases]
    data = [(world / name, damage) if name.startswith("material/") else None for name, damage, *_ in cases]
    (errors,) = run_processes(train_each, 1, runs, data, timeout=1500.0)
    return [(name, damage.__name__, copy, error) for (name, damage, _, copy), error in zip(cases, errors, strict=True)]


def assert_ends_like_the_whole_run(world, copy, *, rows=True):
    if rows:
        assert_equal_runs(copy / "base", world / "whole")
    else:
        first, second = states(copy / "base"), states(world / "whole")
        assert all(value.equal(second[key]) for key, value in first.items())


@pytest.mark.timeout(1800)
def test_damaged_files_of_the_newest_checkpoint(world, tried):
    names = cases_of(world, f"base/checkpoints/step_{FIRST:08d}")
    for name, damage, copy, error in outcomes(world, names):
        with tried.case(f"{damage} {name}"):
            assert error is None, error
            assert_ends_like_the_whole_run(world, copy)
    tried.note = f"{len(names)} files; the run went on from the checkpoint before, bit for bit"


@pytest.mark.timeout(1800)
def test_damaged_files_of_all_checkpoints(world, tried):
    names = [name for name in cases_of(world, f"base/checkpoints/step_{FIRST:08d}") if name.endswith(".pt")]
    for name in names:
        other = Path(name.replace(f"step{FIRST}", "step3").replace(f"step_{FIRST:08d}", "step_00000003"))
        content, copy = disturbed(world, name, flip, label="both-")
        flip(copy / other)
        ((error,),) = run_processes(train_each, 1, [content])
        with tried.case(f"flip {name} and {other}"):
            assert error is not None and "no checkpoint of this run is whole" in error
            assert Path(name).name in error and "checksum" in error, error
    tried.note = "refused, with the name of each damaged file"


@pytest.mark.timeout(1800)
def test_checkpoint_files_that_are_swapped_between_steps(world, tried):
    names = [name for name in cases_of(world, f"base/checkpoints/step_{FIRST:08d}") if not name.endswith(".py")]
    cases = []
    for name in names:
        older = name.replace(f"step{FIRST}", "step3").replace(f"step_{FIRST:08d}", "step_00000003")
        if (world / older).read_bytes() != (world / name).read_bytes():
            cases.append(
                (
                    name,
                    *disturbed(world, name, lambda path, older=older: shutil.copyfile(world / older, path), "swapped-"),
                )
            )
    (errors,) = run_processes(train_each, 1, [content for _, content, _ in cases], timeout=600.0)
    for (name, _, copy), error in zip(cases, errors, strict=True):
        with tried.case(f"swapped {name}"):
            assert error is None, error
            assert_ends_like_the_whole_run(world, copy)
    tried.note = "each file of step 6 replaced by that of step 3; the run went on from step 3, bit for bit"


@pytest.mark.timeout(1800)
def test_damaged_data_files(world, tried):
    names = [name for name in cases_of(world, "material") if name.endswith((".bin", ".idx"))]
    for name, damage, _, error in outcomes(world, names):
        with tried.case(f"{damage} {name}"):
            prefix = name.rsplit(".", 1)[0]
            assert error is not None and prefix in error, error
    tried.note = "refused, with the name of the data set"


@pytest.mark.timeout(1800)
def test_damaged_files_of_the_index_cache(world, tried):
    names = cases_of(world, "base/data_index")
    for name, damage, copy, error in outcomes(world, names):
        with tried.case(f"{damage} {name}"):
            assert error is None, error
            assert_ends_like_the_whole_run(world, copy)
    tried.note = f"{len(names)} files; built again, and the run went on bit for bit"


@pytest.mark.timeout(1800)
def test_damaged_metrics(world, tried):
    for _, damage, copy, error in outcomes(world, ["base/metrics.jsonl"]):
        with tried.case(damage):
            assert error is None, error
            assert_ends_like_the_whole_run(world, copy, rows=False)
            assert [row["step"] for row in curve(copy / "base") if row["kind"] == "train"][-3:] == [7, 8, 9]
    tried.note = "lines that are no rows are dropped and reported; weights bit for bit"
