"""Cuts samples into equal slices for the ranks that share them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from incr_ds.data.targets import Targets


def slices(batches: Iterable[tuple[Tensor, Targets]], rank: int, size: int) -> Iterator[tuple[Tensor, Targets]]:
    """Slice ``rank`` of ``size`` of each sample's tokens, with the labels and the cached teacher's entries of these tokens.

    The last label of a slice is the first token of the next one.
    """
    for input_ids, targets in batches:
        if isinstance(targets, Tensor):
            yield _slice(input_ids, rank, size), _slice(targets, rank, size)
        else:
            labels, indices, log_probs = (_slice(part, rank, size) for part in targets)
            yield _slice(input_ids, rank, size), (labels, indices, log_probs)


def _slice(tokens: Tensor, rank: int, size: int) -> Tensor:
    """[B, S, ...] -> [B, S / size, ...]."""
    return tokens.chunk(size, dim=1)[rank].contiguous()
