"""Finds the folder of an iteration in a folder that Megatron-LM saves to."""

from __future__ import annotations

from pathlib import Path

from incr_ds.checkpoint.megatron_core.common import FORMAT_FILE
from incr_ds.checkpoint.megatron_core.metadata import FILE
from incr_ds.checkpoint.megatron_core.rank_files import FILE as RANK_FILE
from incr_ds.errors import CheckpointError

LATEST = "latest_checkpointed_iteration.txt"
_LONGEST = 40  # bytes


def iteration_folder(path: Path, tag: str | None) -> Path | None:
    """The folder with the tensors: ``path`` itself, or that of ``tag`` or of the latest iteration in it.

    None if ``path`` is not Megatron's. Raises CheckpointError if the iteration is missing or incomplete.
    """
    if (path / FILE).is_file() or has_rank_files(path):
        return path
    if not (path / LATEST).is_file():
        return None
    folder = path / (tag or _named(path / LATEST))
    if not folder.is_dir():
        present = ", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir())) or "none"
        raise CheckpointError(f"{folder}: missing; {LATEST} names it, or --tag does; existing folders: {present}.")
    if not any((folder / name).is_file() for name in (FORMAT_FILE, FILE)) and not has_rank_files(folder):
        raise CheckpointError(
            f"{folder}: no {FORMAT_FILE}; the checkpoint was not saved completely. Use another iteration."
        )
    return folder


def has_rank_files(folder: Path) -> bool:
    """Whether an iteration's folder is in the format torch: a folder for each model-parallel rank."""
    return not (folder / FORMAT_FILE).is_file() and any(folder.glob(f"mp_rank_*/{RANK_FILE}"))


def _named(latest: Path) -> str:
    with open(latest, "rb") as stream:
        text = stream.read(_LONGEST + 1).decode("utf-8", errors="replace").strip()
    if text == "release":
        return text
    if not text.isascii() or not text.isdigit() or len(text) > _LONGEST:
        raise CheckpointError(
            f"{latest}: expected a number of an iteration, or release, found {text[:40]!r}; the file is damaged. Name the "
            "iteration's folder with --tag."
        )
    return f"iter_{int(text):07d}"
