"""The folder in which a corpus is written until it is whole: one run at a time, and the next run goes on in it.

    .NAME.lock                    held while a run writes NAME
    .NAME.incomplete-corpus-KEY/  the files; KEY is a hash of everything that decides their bytes

The finished files are moved beside it one after the other, the facts last. A run that is killed in between finishes that
when it is started again.
"""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from incr_ds.checkpoint.lock import locked
from incr_ds.checkpoint.parents import own_parents
from incr_ds.checkpoint.publish import flush, write_atomically
from incr_ds.config.json_file import read_json
from incr_ds.errors import ConfigError, IncrError

_FINISHED = "finished.json"


@contextmanager
def corpus_workspace(output: Path, key: str, targets: Sequence[Path], *, overwrite: bool) -> Iterator[Path]:
    """Yield the folder for the corpus ``output``, which may hold what an interrupted run with the same key wrote.

    If the block ends with an IncrError the folder is removed. After anything else it stays for the next run. Raises
    ConfigError if one of ``targets``, the files to publish, exists, unless ``overwrite``. Raises CheckpointError if another
    run writes to it.
    """
    with own_parents(output), locked(output):
        folder = output.with_name(f".{output.name}.incomplete-corpus-{key}")
        if not is_finished(folder):
            _refuse_existing(output, targets, overwrite=overwrite)
        for other in output.parent.glob(f".{glob.escape(output.name)}.incomplete-corpus-*"):
            if other != folder:
                shutil.rmtree(other)
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except IncrError:
            shutil.rmtree(folder)
            raise


def _refuse_existing(output: Path, targets: Sequence[Path], *, overwrite: bool) -> None:
    existing = [str(path) for path in targets if path.exists()]
    if existing and not overwrite:
        raise ConfigError(
            f"--output {output}: exists already: {', '.join(existing)}. Pass --overwrite, or choose another prefix."
        )


def is_finished(folder: Path) -> bool:
    """Whether all files in the folder are written, so that only moving them is left."""
    return (folder / _FINISHED).is_file()


def publish_files(folder: Path, targets: Sequence[Path]) -> None:
    """Move the files of ``folder`` that have the names of ``targets`` to them, and remove the folder.

    Targets that the folder has no file for are removed. The last target disappears first and appears last, so that it always
    belongs to the others.
    """
    if not is_finished(folder):
        made = [target.name for target in targets if (folder / target.name).exists()]
        for name in made:
            _flush_all(folder / name)
        write_atomically(folder / _FINISHED, json.dumps({"files": made}) + "\n")
    made = read_json(folder / _FINISHED, ConfigError)["files"]
    for target in reversed(targets):
        if (folder / target.name).exists() or target.name not in made:
            _remove(target)
    for target in targets:
        if (folder / target.name).exists():
            os.replace(folder / target.name, target)
    flush(folder.parent)
    shutil.rmtree(folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush_all(path: Path) -> None:
    for inner in (path, *(path.rglob("*") if path.is_dir() else ())):
        flush(inner)
