"""Checks that a checkpoint's files are what was written, by its manifest or by the checksums inside its files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.opening import OpenedCheckpoint, open_source
from incr_ds.checkpoint.publish import MANIFEST, hash_as_listed, verify_manifest
from incr_ds.checkpoint.torch_file.checksums import check_records
from incr_ds.errors import CheckpointError

_TENSORS = (".pt", ".safetensors", ".bin", ".distcp")


def check_file(path: Path, listed: Mapping[str, Any] | None) -> str:
    """Check a file against its manifest entry or, without one, its own checksums. Returns its xxh3.

    Raises CheckpointError that names the tensors that changed.
    """
    if listed is None:
        return check_records(path)
    try:
        return hash_as_listed(path, listed)
    except CheckpointError:
        if "tensors" not in listed:
            check_records(path)
        raise


def check_description(folder: Path) -> None:
    """Check a folder that has a manifest, except the content of its tensors, which are checked as they are read.

    Nothing may be missing, foreign or of another size, and files without tensors (config, plan, tokenizer) must be as
    published. Raises CheckpointError that names the first wrong file.
    """
    if (folder / MANIFEST).is_file():
        verify_manifest(folder, lambda path, listed: "" if path.suffix in _TENSORS else hash_as_listed(path, listed))


def open_described(
    path: Path, tag: str | None = None, config: Path | None = None, *, trust: bool = False
) -> OpenedCheckpoint:
    """Open a folder like ``open_source``, after ``check_description``."""
    check_description(Path(path))
    return open_source(path, tag, config, trust=trust)


def check_folder(folder: Path, checkpoint: LogicalCheckpoint | None = None) -> dict[str, Any] | None:
    """Check every file of a folder by its manifest, which is returned, or without one the files of ``checkpoint``."""
    if (folder / MANIFEST).is_file():
        return verify_manifest(folder, check_file)
    for path in checkpoint.facts.files if checkpoint is not None else ():
        check_records(path)
    return None
