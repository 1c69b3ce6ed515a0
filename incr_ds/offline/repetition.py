"""How much a model gains where its input repeats: whether it copies from its context."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from incr_ds.arch.architecture import check_context
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.errors import ConfigError
from incr_ds.offline.compare import load_model

SEQUENCES, BATCH = 64, 4  # sequences of random tokens, and how many of them are in memory at once


def checkpoint_repetition_gain(checkpoint: LogicalCheckpoint, sequence_length: int, *, device: str = "cpu") -> float:
    """``repetition_gain`` of a checkpoint. Raises ConfigError for sequences that are too long for it, or too short."""
    check_context(checkpoint.architecture, sequence_length, "--sequence-length")
    if sequence_length < 4:
        raise ConfigError(f"--sequence-length {sequence_length}: --repetition needs 4 tokens or more.")
    model = load_model(checkpoint, device=device)
    return repetition_gain(model, checkpoint.architecture.sizes["vocab"], sequence_length)


@torch.no_grad()
def repetition_gain(model: torch.nn.Module, vocabulary: int, sequence_length: int) -> float:
    """The mean loss on random tokens minus that on the same tokens once more (nats per token), one half of a sequence each.

    A model with induction heads copies the second half from the first (Olsson et al. 2022, arXiv 2209.11895). Without them
    the gain is about 0. The first token of either half is left out: nothing before it says what it is.
    """
    half = sequence_length // 2
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(0, vocabulary, (SEQUENCES, half), generator=generator)
    device = next(iter(model.parameters()), once).device
    losses = torch.cat([_losses(model, rows.to(device)) for rows in once.repeat(1, 2).split(BATCH)])
    return (losses[:, : half - 1].mean() - losses[:, half:].mean()).item()


def _losses(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Losses [B, S] of ``tokens`` [B, S + 1], of each from those before it."""
    logits = model(tokens[:, :-1]).logits.float()  # [B, S, V]
    return F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
