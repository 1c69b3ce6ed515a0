"""Generates text with any supported checkpoint, as a quick look at a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.errors import ConfigError
from incr_ds.offline.compare import load_model


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the most likely one at ``temperature`` 0, otherwise drawn from the top share ``top_p`` of
    the probability, with ``seed``. ``repetition_penalty`` above 1 makes tokens that occurred before less likely."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0


def generate_text(
    checkpoint: LogicalCheckpoint, tokenizer: Path, prompt: str, num_tokens: int, sampling: Sampling | None = None
) -> str:
    """Return ``prompt`` and up to ``num_tokens`` tokens that the model adds to it, in fp32.

    ``tokenizer`` is a transformers tokenizer folder. Raises ConfigError if transformers cannot load it, if it has tokens that
    the model does not have, and for a prompt without tokens.
    """
    import torch

    sampling = sampling or Sampling()
    codec = load_tokenizer(tokenizer)
    inputs = codec(prompt, return_tensors="pt", return_token_type_ids=False)
    ids = inputs["input_ids"]
    if not ids.numel():
        raise ConfigError("--prompt: the tokenizer gives no tokens for it; pass a longer beginning.")
    check_vocabulary(checkpoint.architecture, tokenizer, ids[0].tolist(), "the prompt")
    torch.manual_seed(sampling.seed)
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0, "repetition_penalty": sampling.repetition_penalty}
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
    end = codec.eos_token_id
    model: Any = load_model(checkpoint)  # transformers mixes generate into its classes, not into their base
    made = model.generate(**inputs, **options, max_new_tokens=num_tokens, eos_token_id=end, pad_token_id=end)
    return str(codec.decode(made[0], skip_special_tokens=True))


def check_vocabulary(architecture: Architecture, tokenizer: Path, ids: Sequence[int], text: str) -> None:
    """Raise ConfigError if the model does not have one of the ``ids`` that ``tokenizer`` gives for ``text``."""
    vocab = architecture.sizes["vocab"]
    if ids and max(ids) >= vocab:
        raise ConfigError(
            f"{tokenizer}: gives token {max(ids)} for {text}, but the model's vocab_size is {vocab}; it is another model's "
            "tokenizer."
        )


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in ``folder``. Raises ConfigError if transformers cannot load it; runs no code of it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files raise many kinds of errors, from Python and from Rust
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{folder}: transformers finds no tokenizer that it can load ({reason}); pass one with --tokenizer FOLDER."
        ) from error
