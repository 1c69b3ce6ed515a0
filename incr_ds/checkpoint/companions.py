"""Files that belong to a model besides its weights: its tokenizer and its generation settings."""

from __future__ import annotations

import shutil
from pathlib import Path

from incr_ds.config.json_file import refuse_pointer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)


def companions(source: Path) -> list[Path]:
    """Those of TOKENIZER_FILES that exist in the folder ``source``. Raises CheckpointError for one that was not fetched."""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for path in found:
        refuse_pointer(path)
    return found


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companions of ``source``."""
    for path in companions(source):
        shutil.copyfile(path, target / path.name)
