"""Files that stand beside a model's tensors: its config, its tokenizer, the multipliers of its tensors, what names the tag."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from incr_ds.arch.multipliers import FILE as MULTIPLIERS_FILE
from incr_ds.arch.multipliers import Multipliers, multipliers_text
from incr_ds.checkpoint.publish import write_atomically
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


@dataclass(frozen=True)
class Companions:
    """``config`` is config.json's text. The tokenizer's files are copied from the folder ``tokenizer``. ``texts`` are further
    files by name, such as latest or an index."""

    config: str
    tokenizer: Path | None
    multipliers: Mapping[str, Multipliers] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write all of them into ``folder``."""
        texts = {"config.json": self.config, **self.texts}
        if self.multipliers:
            texts[MULTIPLIERS_FILE] = multipliers_text(self.multipliers)
        for name, text in texts.items():
            write_atomically(folder / name, text)
        for path in tokenizer_files(self.tokenizer) if self.tokenizer is not None else ():
            shutil.copyfile(path, folder / path.name)


def tokenizer_files(source: Path) -> list[Path]:
    """Those of TOKENIZER_FILES that the folder ``source`` has; CheckpointError for one that was not fetched."""
    found = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    for path in found:
        refuse_pointer(path)
    return found
