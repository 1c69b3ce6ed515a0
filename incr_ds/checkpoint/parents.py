"""Creates the folders above an output, and removes them again if nothing was written there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def own_parents(output: Path) -> Iterator[None]:
    """Create the folders above ``output`` for this block. Afterwards, remove those that it created and left empty."""
    made = [folder for folder in output.absolute().parents if not folder.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:  # innermost first
            try:
                folder.rmdir()
            except OSError:  # not empty, or never created
                break
