"""Compares two checkpoints of any format, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from incr_ds.checkpoint.base import MUON_STATES, LogicalCheckpoint, State, row_portions

_ELEMENTS = 1 << 20  # compared at once


@dataclass(frozen=True)
class Difference:
    """One tensor that differs between the two. ``what`` describes how.

    If the shapes are equal, ``elements`` of them differ by up to ``largest`` (nan if one of them is).
    """

    name: str
    state: State
    what: str
    elements: int = 0
    largest: float = 0.0


def differences(first: LogicalCheckpoint, second: LogicalCheckpoint) -> Iterator[Difference]:
    """Yield every difference between the weights and moments of two checkpoints, in the order of the first one's tensors.

    Values are compared a portion at a time, in fp32 or more. A state that only one of the two has is reported once for the
    whole checkpoint, as tensor ``*``.
    """
    for state in MUON_STATES:
        held = [state in checkpoint.facts.states for checkpoint in (first, second)]
        if held[0] != held[1]:
            yield Difference("*", state, "only in the first" if held[0] else "only in the second")
        elif held[0]:
            yield from _state_differences(first, second, state)


def _state_differences(first: LogicalCheckpoint, second: LogicalCheckpoint, state: State) -> Iterator[Difference]:
    ours, theirs = first.architecture.by_name, second.architecture.by_name
    for name in dict.fromkeys([*ours, *theirs]):
        held = [
            name in known and state in checkpoint.facts.states_of(name)
            for known, checkpoint in ((ours, first), (theirs, second))
        ]
        if held == [False, False]:
            continue
        if held[0] != held[1]:
            yield Difference(name, state, "only in the first" if held[0] else "only in the second")
        elif ours[name].shape != theirs[name].shape:
            yield Difference(name, state, f"shape {list(ours[name].shape)} and {list(theirs[name].shape)}")
        elif (found := _compare(first, second, name, state)) is not None:
            yield found


def _compare(first: LogicalCheckpoint, second: LogicalCheckpoint, name: str, state: State) -> Difference | None:
    shape = first.architecture.by_name[name].shape
    elements, largest = 0, 0.0
    for bounds in row_portions(shape, _ELEMENTS):
        pair = [checkpoint.read(name, state, bounds) for checkpoint in (first, second)]
        dtype = torch.promote_types(torch.promote_types(pair[0].dtype, pair[1].dtype), torch.float32)
        one, other = (part.to(dtype) for part in pair)
        wrong = one != other
        if count := int(wrong.count_nonzero()):
            elements += count
            portion = float((one - other).abs()[wrong].max())
            largest = portion if math.isnan(portion) or portion > largest else largest
    return Difference(name, state, "values", elements, largest) if elements else None
