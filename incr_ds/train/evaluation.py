"""Held-out loss of a checkpoint outside of a run: the same samples as in training, in transformers' own model."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from incr_ds.arch.architecture import check_context
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.data.facts import tokens_per_byte
from incr_ds.data.fingerprint import describe
from incr_ds.data.samples import open_held_out_data
from incr_ds.offline.compare import load_model
from incr_ds.offline.text_loss import loss_sum


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean next-token loss in nats over ``samples`` samples. ``bits_per_byte`` is None if the bytes are not known."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    samples: int
    tokens: int


def bits_per_byte(loss: float, prefix: str) -> float | None:
    """Convert a loss in nats per token on the data set ``prefix`` to bits per byte; None if its bytes are not known."""
    density = tokens_per_byte(prefix)
    return None if density is None else loss / math.log(2.0) * density


def evaluate_checkpoint(
    checkpoint: LogicalCheckpoint,
    prefix: str,
    sequence_length: int,
    samples: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> HeldOutLoss:
    """Loss of ``checkpoint`` on the first ``samples`` held-out samples of the data set ``prefix``.

    Raises ConfigError for missing data, too few samples, and tokens outside the model's vocabulary.
    """
    check_context(checkpoint.architecture, sequence_length, str(checkpoint.facts.path))
    content = describe(prefix)
    content.check_tokens(checkpoint.architecture.sizes["vocab"])
    with tempfile.TemporaryDirectory() as cache:
        data = open_held_out_data(content, sequence_length, Path(cache), samples)
        model, total = load_model(checkpoint, dtype, device), 0.0
        with torch.no_grad():
            for number in range(samples):
                total += loss_sum(model, torch.from_numpy(data.tokens(number))[None])
                if progress:
                    progress("evaluating samples", number + 1, samples)
    num_tokens = samples * sequence_length
    loss = total / num_tokens
    return HeldOutLoss(loss, math.exp(loss), bits_per_byte(loss, prefix), samples, num_tokens)
