"""How many elements ZeRO gives to each data-parallel rank. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

ALIGNMENT = 2  # ZeRO pads each group to a multiple of this many elements per data-parallel rank


def partition_size(numel: int, num_ranks: int) -> int:
    """ZeRO-1/2: elements of a group of ``numel`` on each rank, padding included."""
    unit = ALIGNMENT * num_ranks
    return math.ceil(numel / unit) * unit // num_ranks


def whole_sizes(shapes: Sequence[tuple[int, ...]], num_ranks: int) -> list[int]:
    """ZeRO-1/2 with Muon: elements of all tensors of which a rank's partition has a part, by rank.

    DeepSpeed orders a group's tensors by their shapes, the largest first, and keeps the momentum of whole tensors.
    """
    numels = [math.prod(shape) for shape in sorted(shapes, reverse=True)]
    size = partition_size(sum(numels), num_ranks)
    stops = list(accumulate(numels))
    return [
        sum(n for n, stop in zip(numels, stops, strict=True) if stop - n < (rank + 1) * size and stop > rank * size)
        for rank in range(num_ranks)
    ]


def share_size(numel: int, num_ranks: int) -> int:
    """ZeRO-3: elements of a parameter on each rank, padding included."""
    return math.ceil(numel / num_ranks)


def share_bounds(numel: int, num_ranks: int, rank: int) -> tuple[int, int]:
    """ZeRO-3: the elements of a parameter that ``rank`` holds, (first, stop); an empty range if padding fills its share."""
    share = share_size(numel, num_ranks)
    first = min(rank * share, numel)
    return first, min(first + share, numel)
