"""Depth operators: for each target layer, the source layer that it copies and whether it is a new one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from incr_ds.errors import GrowthError


@dataclass(frozen=True)
class LayerSource:
    """A target layer: the source layer that it copies, whether it is inserted, and how many target layers copy it."""

    layer: int
    is_new: bool
    copies: int = 1


def map_layers(method: str, old: int, new: int, given: Sequence[int] | None = None) -> tuple[LayerSource, ...]:
    """The layer map from ``old`` to ``new`` layers by one of METHODS, or ``given`` for method "map".

    If several target layers copy one source layer, all but one are new: the later ones or, for "prepend", the earlier.
    Raises GrowthError for fewer layers than the source's, and for numbers of layers that the method cannot make.
    """
    if new < old and method != "map":
        raise GrowthError(f"target.num_hidden_layers: {new} is smaller than the source's {old}; growth only adds.")
    copied = _given(given, old, new) if method == "map" else METHODS[method](old, new)
    counts = Counter(copied)
    seen_from = range(new) if method != "prepend" else range(new - 1, -1, -1)
    kept: dict[int, int] = {}
    for position in seen_from:
        kept.setdefault(copied[position], position)
    return tuple(LayerSource(layer, kept[layer] != position, counts[layer]) for position, layer in enumerate(copied))


def keeps_order(layers: Sequence[LayerSource], old: int) -> bool:
    """True if the layers that are not new are all of the source's, in order. New ones that write nothing then do not matter."""
    return [layer.layer for layer in layers if not layer.is_new] == list(range(old))


def _interleave(old: int, new: int) -> list[int]:
    return [layer * old // new for layer in range(new)]


def _stack(old: int, new: int) -> list[int]:
    return [layer % old for layer in range(new)]


def _append(old: int, new: int) -> list[int]:
    """Copies of the last layers on top: MSLT (Yang et al., 2020)."""
    return [*range(old), *_tail(old, new - old)]


def _prepend(old: int, new: int) -> list[int]:
    return [*_stack(old, new - old), *range(old)]


def _solar(old: int, new: int) -> list[int]:
    """Two copies, the first without its last layers, the second without its first (Kim et al., 2023: 32 to 48)."""
    if new > 2 * old or (2 * old - new) % 2:
        fitting = [count for count in (new - 1, new + 1, 2 * old) if old <= count <= 2 * old and count % 2 == 0]
        raise GrowthError(
            f"target.num_hidden_layers: {new} is not 2 x {old} less an even number of layers, which depth.method: solar makes; "
            f"nearest counts that work: {', '.join(map(str, sorted(set(fitting))))}."
        )
    overlap = (2 * old - new) // 2
    return [*range(old - overlap), *range(overlap, old)]


def _midas(old: int, new: int) -> list[int]:
    """The middle block repeated right after itself (Saunshi et al., 2024)."""
    added = new - old
    block = min(added, old)
    stop = (old + block + 1) // 2
    middle = list(range(stop - block, stop))
    repeated = chain.from_iterable(middle for _ in range(-(-added // max(block, 1))))
    return [*range(stop), *list(repeated)[:added], *range(stop, old)]


def _expand(old: int, new: int) -> list[int]:
    """After each of equal groups of layers, a copy of the group's last one: LLaMA-Pro's block expansion (Wu et al., 2024)."""
    added = new - old
    ends = [math.ceil((group + 1) * old / added) - 1 for group in range(added)]
    return sorted([*range(old), *ends])


def _tail(old: int, count: int) -> list[int]:
    """``count`` layers that end with the last one, starting over if there are more than the source has."""
    return [(old - count + position) % old for position in range(count)]


METHODS: Mapping[str, Callable[[int, int], list[int]]] = {
    "interleave": _interleave,
    "stack": _stack,
    "append": _append,
    "prepend": _prepend,
    "solar": _solar,
    "midas": _midas,
    "expand": _expand,
}


def _given(given: Sequence[int] | None, old: int, new: int) -> list[int]:
    listed = list(given or ())
    wrong = [layer for layer in listed if not 0 <= layer < old]
    if wrong:
        raise GrowthError(f"depth.map: {wrong[0]} is not a layer of the source; its layers are 0 to {old - 1}.")
    if len(listed) != new:
        raise GrowthError(
            f"depth.map lists {len(listed)} layers, but target.num_hidden_layers is {new}; make them the same."
        )
    return listed
