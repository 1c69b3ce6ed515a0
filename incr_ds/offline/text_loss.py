"""Perplexity and bits per byte of a checkpoint on a text file."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from incr_ds.arch.architecture import check_context
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.config.json_file import LARGE, read_text
from incr_ds.errors import ConfigError
from incr_ds.offline.compare import load_model
from incr_ds.offline.generation import check_vocabulary, load_tokenizer


@dataclass(frozen=True)
class TextLoss:
    """Mean loss in nats per token over the ``tokens`` of a text of ``bytes`` bytes.

    ``unknown_tokens`` stand for characters that the tokenizer does not know. The model need not predict those characters, so
    that bits per byte come out too low if there are many.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    unknown_tokens: int


def loss_sum(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Sum of the next-token losses in nats of ``tokens`` [B, S + 1]."""
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(tokens[:, :-1]).logits.float()  # [B, S, V]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").item()


@torch.no_grad()
def evaluate_text(
    checkpoint: LogicalCheckpoint,
    tokenizer: Path,
    file: Path,
    sequence_length: int,
    *,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> TextLoss:
    """Loss of ``checkpoint`` on all of the UTF-8 text in ``file``, in windows of ``sequence_length`` tokens.

    Each token is predicted once, from those before it in its window. The text's first token is predicted from the tokenizer's
    beginning-of-text token (or its end-of-text token); a tokenizer without either leaves it out. Raises ConfigError for a
    text of fewer than two tokens, for a file that is not text, and for tokens that the model does not have.
    """
    check_context(checkpoint.architecture, sequence_length, "--sequence-length")
    text, codec = read_text(file, ConfigError, most=LARGE), load_tokenizer(tokenizer)
    ids: list[int] = codec(text, add_special_tokens=False, verbose=False)["input_ids"]
    check_vocabulary(checkpoint.architecture, tokenizer, ids, str(file))
    first = codec.bos_token_id if codec.bos_token_id is not None else codec.eos_token_id
    scored = ids if first is None else [first, *ids]
    if len(scored) < 2:
        raise ConfigError(f"{file}: {len(ids)} tokens; expected a text of two tokens or more.")
    model, total, num_tokens = load_model(checkpoint, device=device), 0.0, len(scored) - 1
    for start in range(0, num_tokens, sequence_length):
        window = torch.tensor([scored[start : start + sequence_length + 1]])
        total += loss_sum(model, window)
        if progress:
            progress("evaluating tokens", min(start + sequence_length, num_tokens), num_tokens)
    size, loss = len(text.encode()), total / num_tokens
    unknown = 0 if codec.unk_token_id is None else ids.count(codec.unk_token_id)
    return TextLoss(loss, math.exp(min(loss, 700.0)), total / math.log(2.0) / size, num_tokens, size, unknown)
