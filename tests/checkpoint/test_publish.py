"""Publishing: whole or not at all, and every damage of what was published is named."""

import errno
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import xxhash

from incr_ds.checkpoint.publish import (
    hash_file,
    publish,
    read_manifest,
    refuse_existing,
    temporary_folder,
    verify_manifest,
    write_atomically,
)
from incr_ds.errors import CheckpointError


@pytest.fixture
def published(tmp_path: Path):
    final = tmp_path / "out"
    with publish(final, "test checkpoint", {"step": 7}) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "a.bin").write_bytes(b"abc" * 1000)
        (folder / "b.bin").write_bytes(b"")
        assert not final.exists()
    return final


def test_manifest_says_what_is_there(published):
    content = json.loads((published / "manifest.json").read_text())
    assert content == verify_manifest(published)
    assert content["kind"] == "test checkpoint" and content["facts"] == {"step": 7}
    assert content["files"] == {
        "b.bin": {"bytes": 0, "xxh3": xxhash.xxh3_128(b"").hexdigest()},
        "inner/a.bin": {"bytes": 3000, "xxh3": xxhash.xxh3_128(b"abc" * 1000).hexdigest()},
    }
    assert content["versions"]["python"] == platform.python_version() and content["versions"]["torch"] == version(
        "torch"
    )
    assert set(content["versions"]) == {
        "python",
        "incr_ds",
        "torch",
        "numpy",
        "safetensors",
        "transformers",
        "deepspeed",
    }
    assert [path.name for path in published.parent.iterdir()] == ["out"]


def test_a_name_that_the_disk_cannot_confirm_is_taken_back(tmp_path: Path, monkeypatch):
    def fail(path):
        if path == tmp_path:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("incr_ds.checkpoint.publish.flush", fail)
    with (
        pytest.raises(CheckpointError, match="Input/output error .*; nothing was published"),
        publish(tmp_path / "out", "x", {}) as folder,
    ):
        (folder / "a.bin").write_bytes(b"abc")
    assert not list(tmp_path.iterdir())


DAMAGES = {
    "changed": (lambda p: p.write_bytes(b"abd" + b"abc" * 999), r"inner/a\.bin: checksum xxh3 .* content changed"),
    "truncated": (lambda p: p.write_bytes(b"abc"), r"inner/a\.bin: 3 bytes, but the manifest lists 3000: truncated"),
    "missing": (lambda p: p.unlink(), r"inner/a\.bin: missing; the manifest lists it with 3000 bytes"),
    "foreign": (lambda p: p.with_name("c").write_bytes(b"x"), r"inner/c: not in the manifest; remove it"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_every_damage_is_named(published, name):
    damage, message = DAMAGES[name]
    damage(published / "inner" / "a.bin")
    with pytest.raises(CheckpointError, match=message):
        verify_manifest(published)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"manifest\.json: missing; the folder was not published by incr_ds"),
        ("{", r"manifest\.json: not valid JSON"),
        ("[]", r"not a valid manifest of version 2"),
        ('{"manifest_version": 3, "files": {}}', r"not a valid manifest of version 2"),
        ('{"manifest_version": 2, "files": {}}', r"its own checksum does not match its content"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, text, message: str):
    if text is not None:
        (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_manifest(tmp_path)


def test_a_failure_publishes_nothing(tmp_path: Path):
    message = r"out: disk on fire \(while writing\); nothing was published"
    with pytest.raises(CheckpointError, match=message), publish(tmp_path / "out", "test", {}) as folder:
        (folder / "a").write_text("half")
        raise OSError("disk on fire")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_kept(published, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"out: exists already and is not an empty folder"):
        refuse_existing(published)
    with pytest.raises(CheckpointError, match=r"exists already"), publish(published, "test", {}):
        pass
    verify_manifest(published)
    (tmp_path / "file").write_text("1")
    with pytest.raises(CheckpointError, match=r"file: exists already"):
        refuse_existing(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with publish(tmp_path / "empty", "test", {}):
        pass
    verify_manifest(tmp_path / "empty")


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    living = temporary_folder(tmp_path / "out")
    dead = living.with_name(living.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    for folder in (living, dead):
        folder.mkdir()
    with publish(tmp_path / "out", "test", {}):
        assert living.exists() and not dead.exists()


def test_write_atomically_replaces(tmp_path: Path):
    path = tmp_path / "latest"
    for text in ("one", "two"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert [entry.name for entry in tmp_path.iterdir()] == ["latest"]
    assert hash_file(path) == xxhash.xxh3_128(b"two").hexdigest()
