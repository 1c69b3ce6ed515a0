"""Built-in text to compare models on: a few sentences, as tokens of a model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from incr_ds.errors import ConfigError

_MARKS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder holds a tokenizer beside the weights."""
    return any((folder / name).is_file() for name in _MARKS)


def load_tokenizer(folder: Path, where: str, *, trust: bool = False) -> Any:
    """The transformers tokenizer of a folder.

    Raises ConfigError that starts with ``where`` if transformers cannot load it, or if it needs its own code and ``trust`` is
    False.
    """
    from transformers import AutoTokenizer

    try:
        # False, not None: with None, transformers asks on the terminal.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)
    except Exception as error:  # damaged files raise many kinds of errors, from Python and from Rust
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{where}: needs Python code in the folder (auto_map), which was not run. If you trust its author, "
                "repeat with --trust."
            ) from error
        raise ConfigError(f"{where}: transformers cannot load it: {_reason(error)}") from error


def sentence_batches(
    folder: Path, vocabulary: int, samples: int, length: int, *, trust: bool = False
) -> list[torch.Tensor]:
    """The package's sentences as tokens of the tokenizer in ``folder``: at most ``samples`` batches of [1, length] tokens.

    Raises ConfigError if the tokenizer cannot be loaded, has tokens that a model of ``vocabulary`` tokens lacks, or gives
    fewer tokens for the sentences than one sample needs.
    """
    where = f"{folder}: tokenizer"
    text = Path(__file__).with_name("sentences.txt").read_text(encoding="utf-8")
    ids = load_tokenizer(folder, where, trust=trust)(text, verbose=False)["input_ids"]
    if max(ids, default=0) >= vocabulary:
        raise ConfigError(f"{where}: has token {max(ids)}, but the model's vocabulary ends before {vocabulary}.")
    if len(ids) < length:
        raise ConfigError(f"{where}: the built-in sentences give {len(ids)} tokens, but a sample needs {length}.")
    return [torch.tensor([ids[start : start + length]]) for start in range(0, len(ids) - length + 1, length)][:samples]


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
