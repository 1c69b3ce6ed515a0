"""One run at a time uses a workspace. It is taken over only if its bytes are right, and replaces only what was published."""

import json
import os
from pathlib import Path

import pytest

from incr_ds.checkpoint.publish import hash_file, verify_manifest
from incr_ds.checkpoint.workspace import open_workspace
from incr_ds.errors import CheckpointError, GrowthError


def write(space, name, content):
    path = space.folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with space.recording():
        space.record(name, {"bytes": len(content), "xxh3": hash_file(path)})


def publish(final, content=b"one", **options):
    with open_workspace(final, "key", **options) as space:
        write(space, "inner/a", content)
        space.publish("test", {})


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def interrupted(final, key="key"):
    """Two files finished, a third half written, then the power fails."""
    with pytest.raises(KeyboardInterrupt), open_workspace(final, key) as space:
        write(space, "inner/a", b"one")
        write(space, "b", b"two")
        (space.folder / "c").write_bytes(b"ha")
        raise KeyboardInterrupt
    return space


def test_published_whole(tmp_path: Path):
    publish(tmp_path / "out")
    assert list(verify_manifest(tmp_path / "out")["files"]) == ["inner/a"]
    assert hidden(tmp_path) == []


def test_an_interrupted_run_is_taken_over(tmp_path: Path):
    interrupted(tmp_path / "out")
    with open_workspace(tmp_path / "out", "key") as space:
        assert set(space.done) == {"inner/a", "b"}
        assert not (space.folder / "c").exists(), "what was not finished is written anew"
        write(space, "c", b"half")
        space.publish("test", {})
    assert set(verify_manifest(tmp_path / "out")["files"]) == {"inner/a", "b", "c"}
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("damage", [b"twO", b"tw", None])
def test_damaged_leftovers_are_written_anew(tmp_path: Path, damage):
    path = interrupted(tmp_path / "out").folder / "b"
    path.unlink() if damage is None else path.write_bytes(damage)
    with open_workspace(tmp_path / "out", "key") as space:
        assert set(space.done) == {"inner/a"} and not path.exists()


@pytest.mark.parametrize("kept", range(3))
def test_a_torn_journal(tmp_path: Path, kept):
    space = interrupted(tmp_path / "out")
    journal = space.folder.with_name(space.folder.name + ".jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    assert [json.loads(line)["path"] for line in lines] == ["inner/a", "b"]
    journal.write_text("".join(lines[:kept]) + '{"path": "c", "dig')
    with open_workspace(tmp_path / "out", "key") as space:
        assert set(space.done) == {"inner/a", "b"} - ({"b"} if kept < 2 else set()) - (
            {"inner/a"} if kept < 1 else set()
        )


def test_another_plan_starts_over(tmp_path: Path):
    interrupted(tmp_path / "out", "old")
    publish(tmp_path / "out")
    assert list(verify_manifest(tmp_path / "out")["files"]) == ["inner/a"]
    assert hidden(tmp_path) == []


def test_a_mistake_leaves_nothing(tmp_path: Path):
    with pytest.raises(GrowthError, match="impossible"), open_workspace(tmp_path / "out", "key") as space:
        write(space, "a", b"1")
        raise GrowthError("impossible")
    assert list(tmp_path.iterdir()) == []


def test_one_run_at_a_time(tmp_path: Path):
    with open_workspace(tmp_path / "out", "key"):
        with pytest.raises(CheckpointError, match=rf"out: process {os.getpid()} on .* is writing to it; wait for it"):
            publish(tmp_path / "out")
    publish(tmp_path / "out")


def test_overwrite_replaces_what_was_published(tmp_path: Path):
    publish(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"exists already .*--overwrite replaces a published checkpoint"):
        publish(tmp_path / "out", b"new")
    assert (tmp_path / "out" / "inner" / "a").read_bytes() == b"one"
    publish(tmp_path / "out", b"new", overwrite=True)
    assert (tmp_path / "out" / "inner" / "a").read_bytes() == b"new"
    verify_manifest(tmp_path / "out")
    assert hidden(tmp_path) == []


def test_overwrite_leaves_other_folders_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("1")
    with pytest.raises(CheckpointError, match=r"contains no manifest\.json, so incr_ds did not publish it"):
        publish(tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "1"


def test_a_crash_between_the_two_renames_loses_nothing(tmp_path: Path):
    publish(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.replaced")
    with pytest.raises(CheckpointError, match="exists already"):
        publish(tmp_path / "out", b"new")
    assert (tmp_path / "out" / "inner" / "a").read_bytes() == b"one"
    publish(tmp_path / "elsewhere", b"old")
    os.rename(tmp_path / "elsewhere", tmp_path / ".out.replaced")  # a crash after the second rename
    publish(tmp_path / "out", b"new", overwrite=True)
    assert (tmp_path / "out" / "inner" / "a").read_bytes() == b"new" and hidden(tmp_path) == []
