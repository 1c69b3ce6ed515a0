"""Reads what prepare_data.py states beside a data set: PREFIX_facts.json."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field

from incr_ds.config.fields import parse_settings
from incr_ds.config.json_file import read_json
from incr_ds.config.training import RunSettings
from incr_ds.data.selection import SPLITS
from incr_ds.errors import ConfigError


class _Counts(BaseModel):
    tokens: int = Field(ge=1)
    bytes: int = Field(ge=1)


class _StoredFacts(BaseModel):
    """The part of PREFIX_facts.json that is read again."""

    splits: dict[str, _Counts]
    end_of_text: int | None = None


def tokens_per_byte(data_prefix: str) -> float | None:
    """Tokens per byte of text in a data set that was prepared here; None if it was prepared elsewhere.

    ``loss / ln 2 * tokens_per_byte`` is bits per byte, which makes tokenizers comparable.
    """
    for split in SPLITS:
        facts = _facts(data_prefix, split)
        if facts is not None and split in facts.splits:
            return facts.splits[split].tokens / facts.splits[split].bytes
    return None


def document_end(run: RunSettings) -> int | None:
    """The token that ends each document, if the run resets attention and positions there; otherwise None.

    Raises ConfigError if a data set of the run does not state it, or states another.
    """
    if not run.data.reset_at_document_end:
        return None
    held_out = run.data.held_out.values() if run.evaluation else ()
    prefixes = [*(corpus.prefix for corpus in run.data.train), *held_out]
    ends = {prefix: _end_of_text(prefix) for prefix in prefixes}
    for prefix, end in ends.items():
        if end is None:
            raise ConfigError(
                f"data.reset_at_document_end: {prefix}: its facts file (tools/prepare_data.py writes it beside the data) is "
                "missing, or states no end_of_text; prepare the data with an end-of-text token, or remove the key."
            )
    if len(set(ends.values())) > 1:
        found = ", ".join(f"{end} in {prefix}" for prefix, end in ends.items())
        raise ConfigError(
            f"data.reset_at_document_end: documents end with different tokens ({found}); prepare all data with the same "
            "tokenizer, or remove the key."
        )
    return ends[prefixes[0]]


def _end_of_text(data_prefix: str) -> int | None:
    found = [facts for split in SPLITS if (facts := _facts(data_prefix, split)) is not None]
    return found[0].end_of_text if found else None


def _facts(data_prefix: str, split: str) -> _StoredFacts | None:
    ending = f"_{split}_text_document"
    path = Path(data_prefix.removesuffix(ending) + "_facts.json")
    if not data_prefix.endswith(ending) or not path.is_file():
        return None
    return parse_settings(read_json(path, ConfigError), _StoredFacts, str(path))
