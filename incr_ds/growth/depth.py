"""Depth operators: for each target layer, the source layer it comes from and whether it is a new one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from incr_ds.errors import GrowthError

DepthMethod = Literal["interleave", "stack"]


@dataclass(frozen=True)
class LayerSource:
    """Target layer: the source layer it copies, and whether it is one too many (the second and later copies)."""

    layer: int
    is_new: bool


def map_layers(method: DepthMethod, old: int, new: int) -> tuple[LayerSource, ...]:
    """The layer map from ``old`` to ``new`` layers; GrowthError if the target has fewer layers."""
    if new < old:
        raise GrowthError(f"target.num_hidden_layers: {new} is smaller than the source's {old}; growth only adds.")
    if method == "stack":
        copied = [layer % old for layer in range(new)]
    else:
        copied = [layer * old // new for layer in range(new)]
    return tuple(LayerSource(layer, layer in copied[:position]) for position, layer in enumerate(copied))
