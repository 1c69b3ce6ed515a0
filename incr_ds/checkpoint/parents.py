"""The folders above an output: made when something is to be written there, and gone again if nothing was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_parents(output: Path) -> Iterator[None]:
    """Make the folders above ``output`` for this block; those that were made, and that it leaves empty, are removed."""
    made = [folder for folder in output.absolute().parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:  # the innermost first
            try:
                folder.rmdir()
            except OSError:  # not empty, or never made
                break
