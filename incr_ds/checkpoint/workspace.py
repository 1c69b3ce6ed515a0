"""The place where a target is written until it is whole: one run at a time, with a journal of finished files.

    .NAME.lock                       held while a run writes NAME; ends with the process
    .NAME.incomplete-plan-KEY/       the files; KEY is a hash of everything that decides their bytes
    .NAME.incomplete-plan-KEY.jsonl  one line per file that is safely on disk: path, size, checksum
    .NAME.incomplete-plan-KEY.R.jsonl    the same by process R, if several processes write

A run that finds the workspace of an interrupted run with its own key continues it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from incr_ds.checkpoint.lock import locked
from incr_ds.checkpoint.manifest import JournalEntry, journal_entry
from incr_ds.checkpoint.parents import own_parents
from incr_ds.checkpoint.publish import MANIFEST, hash_file, refuse_existing, remove_abandoned, reveal, seal
from incr_ds.config.json_file import LARGE, read_text
from incr_ds.errors import CheckpointError, IncrError


class Workspace:
    """The folder in which a target grows. ``done`` maps the path of each finished file to its size and checksum.

    If several processes write, each has its own journal, and ``writer`` is its number. The first opens and publishes.
    """

    def __init__(
        self, final: Path, key: str, writer: int = 0, done: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.final = final
        self.folder = final.with_name(f".{final.name}.incomplete-plan-{key}")
        self._journal = self.folder.with_name(self.folder.name + (f".{writer}.jsonl" if writer else ".jsonl"))
        self._notes: TextIO
        self.done: dict[str, Mapping[str, Any]] = dict(done or {})

    def open(self) -> None:
        """Reuse files of an interrupted run with the same key if their bytes are still right."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.done = {entry["path"]: entry["digest"] for entry in self._entries() if self._is_intact(entry)}
        lines = [_line(path, digest) for path, digest in self.done.items()]
        self._journal.write_text("".join(lines), encoding="utf-8")
        for journal in self._journals():
            if journal != self._journal:
                journal.unlink()
        for path in self.folder.rglob("*"):
            if path.is_file() and str(path.relative_to(self.folder)) not in self.done:
                path.unlink()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep the journal open in this block, for ``record``."""
        with open(self._journal, "a", buffering=1, encoding="utf-8") as self._notes:
            yield

    def record(self, path: str, digest: Mapping[str, Any]) -> None:
        """Note a file that is flushed to disk. If a crash loses the note, only the work on that file is repeated."""
        self._notes.write(_line(path, digest))
        self.done[path] = digest

    def publish(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Write the manifest and make the folder visible under its name, in place of an existing checkpoint."""
        seal(self.folder, kind, facts, self.done)
        replaced = _replaced(self.final)
        if self.final.is_dir() and any(self.final.iterdir()):
            os.rename(self.final, replaced)
        try:
            reveal(self.folder, self.final)
        except OSError:
            if replaced.is_dir():
                os.rename(replaced, self.final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
        self._remove_journals()

    def discard(self) -> None:
        """Remove the folder and its journal."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._remove_journals()

    def remove_others(self) -> None:
        """Remove workspaces of other plans for the same output, which no run with the lock uses."""
        for path in self.final.parent.glob(f".{self.final.name}.incomplete-plan-*"):
            if path != self.folder and path not in self._journals():
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _entries(self) -> Iterator[JournalEntry]:
        for journal in self._journals():
            for line in read_text(journal, CheckpointError, most=LARGE).splitlines():
                if (entry := journal_entry(line)) is None:
                    break  # the line that the crash cut off
                yield entry

    def _journals(self) -> list[Path]:
        """The journals of all processes that wrote here."""
        return sorted(self.folder.parent.glob(f"{self.folder.name}*.jsonl"))

    def _remove_journals(self) -> None:
        for journal in self._journals():
            journal.unlink(missing_ok=True)

    def _is_intact(self, entry: JournalEntry) -> bool:
        path, digest = self.folder / entry["path"], entry["digest"]
        return path.is_file() and path.stat().st_size == digest["bytes"] and hash_file(path) == str(digest["xxh3"])


@contextmanager
def open_workspace(final: Path, key: str, *, overwrite: bool = False) -> Iterator[Workspace]:
    """Open the workspace for ``final``, locked against other runs.

    If the block ends with an IncrError the workspace is removed. After anything else (a full disk, an interrupt) it stays
    for the next run. Raises CheckpointError if ``final`` exists, unless ``overwrite`` and it is a published checkpoint, or
    if another run writes to it.
    """
    with own_parents(final), locked(final):
        _restore(final)
        refuse_existing(final, overwrite=overwrite)
        workspace = Workspace(final, key)
        remove_abandoned(final)
        workspace.remove_others()
        try:
            workspace.open()
            yield workspace
        except IncrError:
            workspace.discard()
            raise


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _restore(final: Path) -> None:
    """Undo a replacement that a crash interrupted, or finish removing what was replaced."""
    replaced = _replaced(final)
    if replaced.is_dir():
        if (final / MANIFEST).is_file():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, final)


def _line(path: str, digest: Mapping[str, Any]) -> str:
    return json.dumps({"path": path, "digest": dict(digest)}, sort_keys=True) + "\n"
