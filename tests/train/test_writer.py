"""What a rank remembers of a file that it could not write, and what the background thread leaves."""

from pathlib import Path

import pytest
import torch

from incr_ds.checkpoint.publish import hash_file
from incr_ds.train.writer import CheckpointWriter

STATE = {"weight": torch.arange(100_000, dtype=torch.float32), "step": 3}


def test_a_full_disk_is_named_and_reported_once():
    writer = CheckpointWriter(True, background=False)
    writer.save(STATE, "/dev/full")  # a file to which nothing can be written
    writer.makedirs("/proc/none")  # a second error does not replace the first
    with pytest.raises(RuntimeError, match="^/dev/full: No space left on device$"):
        writer.check()
    writer.check()


def test_a_full_disk_in_the_background_is_reported_at_the_end(tmp_path: Path):
    writer = CheckpointWriter(True, background=True)
    writer.save(STATE, "/dev/full")
    writer.save(STATE, str(tmp_path / "whole.pt"))
    writer.check()
    with pytest.raises(RuntimeError, match="^/dev/full: No space left on device$"):
        writer.finish()
    assert writer.finish() == {} and not writer.is_writing


def test_the_background_writes_what_was_saved_and_not_what_came_after(tmp_path: Path):
    writer, state = CheckpointWriter(True, background=True), {"weight": STATE["weight"].clone()}
    writer.save(state, str(tmp_path / "a.pt"))
    state["weight"].zero_()
    path, digest = next(iter(writer.finish().items()))
    assert torch.equal(torch.load(path)["weight"], STATE["weight"])
    assert digest == {"bytes": path.stat().st_size, "xxh3": hash_file(path)}


def test_what_a_failed_save_has_left_does_not_fail_the_next(tmp_path: Path):
    """Another rank could not begin, so nobody waits for this rank's file."""
    writer, state = CheckpointWriter(True, background=True), {"weight": STATE["weight"].clone()}
    writer.save(state, "/dev/full")
    writer.abandon()
    writer.save(state, str(tmp_path / "a.pt"))
    assert list(writer.finish()) == [tmp_path / "a.pt"]


def test_the_next_save_fills_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    places, save = [], torch.save

    def recorded(content, *arguments, **options):
        places.append(content["weight"].data_ptr())
        save(content, *arguments, **options)

    monkeypatch.setattr(torch, "save", recorded)
    writer = CheckpointWriter(True, background=True)
    for step in range(2):
        writer.save(STATE | {"step": step}, str(tmp_path / "a.pt"))
        writer.finish()
    assert places[0] == places[1] != STATE["weight"].data_ptr()
