"""Width operators. Each returns the growth of one axis, or of two for attention heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from incr_ds.config.growth import HiddenMethod
from incr_ds.errors import GrowthError
from incr_ds.growth.axis import FRESH, AxisGrowth, Fill, identity
from incr_ds.growth.counter import IntVector, choices

NewUnits = Literal["zero-output", "copy", "random", "constant"]
Order = Literal["tile", "interleave", "drawn"]
PADDING = ("random", "constant")  # new units that are read with the values written to them, which changes the function
WRITTEN: Mapping[NewUnits, Fill] = {
    "zero-output": "random",
    "copy": "random",
    "random": "random",
    "constant": "constant",
}
READ: Mapping[NewUnits, Fill] = {"zero-output": "zero", "copy": "zero", "random": "random", "constant": "constant"}


def grow_hidden(
    method: HiddenMethod,
    old: int,
    new: int,
    norm: Literal["rms", "layer"] = "rms",
    seed: int = 0,
    order: Order = "tile",
) -> AxisGrowth:
    """Growth of the residual stream from ``old`` to ``new`` dimensions. WidthRecipe describes the methods.

    Raises GrowthError, with the nearest sizes that work, if the sizes or the norm do not allow the method.
    """
    if new < old:
        raise GrowthError(f"target.hidden_size: {new} is smaller than the source's {old}; growth only adds.")
    if new == old:
        return identity("hidden", old)
    uneven: HiddenMethod = "isometric" if norm == "rms" else "mean"
    if method == "auto":
        method = uneven if new % old else "integer"
    if method in ("mean", "centred") and norm == "rms":
        raise GrowthError(
            f"width.hidden: {method} pads for LayerNorm, but this family has RMSNorm; use isometric or zero, which take any "
            "larger size."
        )
    if method == "integer" and new % old:
        lower = new // old * old
        raise GrowthError(
            f"target.hidden_size: {new} is not a multiple of the source's {old}, which width.hidden: integer needs; "
            f"nearest sizes that work: {lower}, {lower + old}. width.hidden: {uneven} takes any larger size."
        )
    if method in ("integer", "isometric"):
        return _copied_hidden(method, old, new, "tile" if (method, order) == ("integer", "drawn") else order, seed)
    if method == "fpi":
        return _unequal_hidden(old, new, seed)
    if method in ("random", "constant"):
        return _filled_hidden(method, old, new)
    return _padded_hidden(method, old, new, norm)


def grow_units(
    axis: str, field: str, old: int, new: int, units: NewUnits, order: Order = "tile", seed: int = 0
) -> AxisGrowth:
    """Growth of an inner axis (FFN neurons) to any larger size."""
    if new < old:
        raise GrowthError(f"target.{field}: {new} is smaller than the source's {old}; growth only adds.")
    if new == old:
        return identity(axis, old)
    if units == "copy":
        index = copy_order(axis, old, new, order, seed)
    else:
        index = [*range(old), *[FRESH] * (new - old)]
    return _inner(axis, units, old, index)


def grow_entries(axis: str, field: str, old: int, new: int) -> AxisGrowth:
    """Growth of a table of tokens or learned positions. New rows, also those of the head, are the mean of the old ones."""
    if new < old:
        raise GrowthError(f"target.{field}: {new} is smaller than the source's {old}; growth only adds.")
    if new == old:
        return identity(axis, old)
    kept = _floats((np.arange(new) < old) * 1.0)
    index = tuple(position if position < old else FRESH for position in range(new))
    return AxisGrowth(axis, "mean", old, index, kept, kept, kept, fresh_out="mean")


def grow_heads(
    old: tuple[int, int], new: tuple[int, int], units: NewUnits, order: Order = "tile", seed: int = 0
) -> tuple[AxisGrowth, AxisGrowth]:
    """Growth of query heads and kv heads that keeps grouped attention right. Returns both axes.

    Query head q reads kv head q // (heads / kv_heads), so every query head must be in a group whose kv head is the one
    that it was trained with. Each old group of g query heads takes ceil(g / g') new groups of g' slots. Groups beyond that
    are fresh (zero-output) or further copies: in turn, or with ``order: drawn`` of random old groups and random heads in
    them. Raises GrowthError if there are too few new groups.
    """
    (heads, kv_heads), (new_heads, new_kv_heads) = old, new
    if old == new:
        return identity("heads", heads), identity("kv_heads", kv_heads)
    _check_head_counts(old, new)
    group, new_group = heads // kv_heads, new_heads // new_kv_heads
    needed = math.ceil(group / new_group)
    kv_index = [kv for kv in range(kv_heads) for _ in range(needed)]
    extra = new_kv_heads - len(kv_index)
    further = choices(seed, "kv_heads/copies", extra, kv_heads) if order == "drawn" else np.arange(extra) % kv_heads
    kv_index += [int(kv) if units == "copy" else FRESH for kv in further]
    drawn = choices(seed, "heads/copies", new_heads, group) if order == "drawn" else None
    head_index = _place_heads(kv_index, group, new_group, units, drawn)
    query = _inner("heads", units, heads, head_index)
    shares = np.array(query.share).reshape(new_kv_heads, new_group).sum(axis=1) / group
    amplitude = tuple(0.0 if kv == FRESH else 1.0 for kv in kv_index)
    gradient = tuple(float(share) for share in shares)
    return query, AxisGrowth(
        "kv_heads", units, kv_heads, tuple(kv_index), amplitude, amplitude, gradient, fresh_out=WRITTEN[units]
    )


def under_norm(axis: AxisGrowth) -> AxisGrowth:
    """Scale ``axis`` so that the mean square stays, if one norm covers all of its units, as over OLMo-2's queries.

    For unit i with c_i copies, n old and N new units, rows are multiplied by sqrt(N / (n c_i)) and the norm's weight by the
    inverse. Fresh units are zero, so that readers find the source's mean square. Padding is not changed.
    """
    if axis.is_identity or axis.method in PADDING:
        return axis
    copies = np.array(axis.copies, dtype=np.float64)
    amplitude = np.where(copies > 0, np.sqrt(axis.new / (axis.old * np.maximum(copies, 1.0))), 0.0)
    gradient = np.array(axis.share) / np.where(copies > 0, amplitude, 1.0)
    return replace(axis, amplitude=_floats(amplitude), gradient=_floats(gradient), fresh_out="zero")


def fitting_kv_heads(old: tuple[int, int], new_heads: int) -> list[int]:
    """The kv head counts that are possible with ``new_heads`` query heads, for an error or a suggestion."""
    heads, kv_heads = old
    divisors = [count for count in range(kv_heads, new_heads + 1) if new_heads % count == 0]
    group = heads // kv_heads
    return [count for count in divisors if kv_heads * math.ceil(group / (new_heads // count)) <= count]


def fitting_heads(old: tuple[int, int], new_kv_heads: int, most: int = 4) -> list[int]:
    """The smallest query head counts, at most ``most``, that can hold the old groups with ``new_kv_heads`` kv heads."""
    heads, kv_heads = old
    if new_kv_heads < kv_heads:
        return []
    first = math.ceil(heads / new_kv_heads) * new_kv_heads
    # With one query head more per group than before, every old group fits into one new group.
    candidates = range(first, new_kv_heads * (heads // kv_heads + most + 1), new_kv_heads)
    return [count for count in candidates if new_kv_heads in fitting_kv_heads(old, count)][:most]


def grow_head_size(old: int, new: int, scaled_by_size: bool = True) -> tuple[AxisGrowth, AxisGrowth]:
    """Growth of a head's size by an integer factor k under rotary positions. Returns the axis of keys and values, and queries'.

    Pair i of the rotation (positions i and i + old / 2) turns at base^(-2i / old), like pair k i of the larger head, so it
    moves there. The planner checks that a scaling of the frequencies keeps this true. New positions of the queries are zero,
    so those of the keys may be random. Queries grow by sqrt(new / old) if scores are divided by the root of the head's size
    (``scaled_by_size``).
    """
    if new % old:
        lower = max(old, new // old * old)
        raise GrowthError(
            f"target.head_dim: {new} is not a multiple of the source's {old}, so the rotations of its pairs do not occur in "
            f"it; nearest sizes that work: {lower}, {lower + old}."
        )
    factor, half = new // old, new // 2
    places = [(position // half, position % half) for position in range(new)]
    index = tuple(side * (old // 2) + pair // factor if pair % factor == 0 else FRESH for side, pair in places)
    kept = np.array(index) != FRESH
    scale = math.sqrt(new / old) if scaled_by_size else 1.0
    ones, scaled, unscaled = (_floats(kept * size) for size in (1.0, scale, 1.0 / scale))
    return (
        AxisGrowth("head_dim", "rotary pairs", old, index, ones, ones, ones),
        AxisGrowth("query_dim", "rotary pairs", old, index, scaled, ones, unscaled, fresh_out="zero"),
    )


def grow_experts(field: str, old: int, new: int) -> AxisGrowth:
    """Growth of a mixture by whole copies of all of its experts. Raises GrowthError otherwise.

    The router scores copies alike. So each copy gets an equal part of the expert's gradient, and so does its router row.
    """
    if new % old:
        lower = max(old, new // old * old)
        raise GrowthError(
            f"target.{field}: {new} is not a multiple of the source's {old} experts, which are copied equally often; nearest "
            f"sizes that work: {lower}, {lower + old}."
        )
    ones, each = (1.0,) * new, (old / new,) * new
    return AxisGrowth("experts", "copy", old, tuple(expert % old for expert in range(new)), ones, ones, each)


def copy_order(axis: str, old: int, new: int, order: Order, seed: int) -> list[int]:
    """The old position of each new one.

    Either as evenly as sizes allow, with earlier ones once more than later ones, or all once and further copies drawn
    (Net2Net, bert2BERT).
    """
    if order == "drawn":
        return [*range(old), *(int(position) for position in choices(seed, f"{axis}/copies", new - old, old))]
    tiled = [position % old for position in range(new)]
    return tiled if order == "tile" else sorted(tiled)


def _copied_hidden(method: str, old: int, new: int, order: Order, seed: int) -> AxisGrowth:
    index = copy_order("hidden", old, new, order, seed)
    counts = np.bincount(index, minlength=old)[index]
    amplitude = np.sqrt(new / (old * counts))
    share = 1.0 / counts
    return AxisGrowth(
        "hidden", method, old, tuple(index), _floats(amplitude), _floats(share), _floats(share / amplitude)
    )


def _padded_hidden(method: HiddenMethod, old: int, new: int, norm: Literal["rms", "layer"]) -> AxisGrowth:
    """Whole copies of the old positions, and new ones that are zero after the norm, so that readers may have any values there.

    New positions are zero, or under LayerNorm the mean of the old ones (average expansion), or zero beside centred ones.
    There is one copy, or for ``lemon`` (Wang et al., 2024) as many as fit.
    """
    copies = new // old if method == "lemon" else 1
    kept = np.arange(new) < copies * old
    index = tuple(position % old if position < copies * old else FRESH for position in range(new))
    strength = 1.0 if method == "zero-scaled-eps" else math.sqrt(new / (copies * old))
    kappa = math.sqrt(old / new) if method == "zero-scaled-eps" else 1.0
    averages = method == "mean" or (method == "lemon" and norm == "layer")
    return AxisGrowth(
        "hidden",
        method,
        old,
        index,
        _floats(kept * strength),
        _floats(kept / copies),
        _floats(kept / (copies * strength)),
        kappa=kappa,
        centred=method == "centred",
        fresh_out="mean" if averages else "zero",
        fresh_in="random",
    )


def _unequal_hidden(old: int, new: int, seed: int) -> AxisGrowth:
    """Function-preserving initialization (Net2Net; bert2BERT's FPI) as published: random further copies, norms unchanged."""
    chosen = choices(seed, "hidden/fpi", new - old, old)
    index = np.concatenate([np.arange(old), chosen])
    share = 1.0 / np.bincount(index, minlength=old)[index]
    ones = (1.0,) * new
    return AxisGrowth("hidden", "fpi", old, tuple(int(i) for i in index), ones, _floats(share), _floats(share))


def _filled_hidden(method: Literal["random", "constant"], old: int, new: int) -> AxisGrowth:
    """Initial value padding: new positions are written and read with given values, without compensation."""
    kept = _floats((np.arange(new) < old) * 1.0)
    index = tuple(position if position < old else FRESH for position in range(new))
    return AxisGrowth("hidden", method, old, index, kept, kept, kept, fresh_out=method, fresh_in=method)


def _inner(axis: str, method: NewUnits, old: int, index: list[int]) -> AxisGrowth:
    """Growth of an inner axis: fresh units produce random or constant values, and are read as zero unless they are padding."""
    counts = np.bincount([i for i in index if i != FRESH], minlength=old)
    shares = [0.0 if i == FRESH else 1.0 / float(counts[i]) for i in index]
    amplitude = tuple(0.0 if i == FRESH else 1.0 for i in index)
    return AxisGrowth(
        axis,
        method,
        old,
        tuple(index),
        amplitude,
        tuple(shares),
        tuple(shares),
        fresh_out=WRITTEN[method],
        fresh_in=READ[method],
    )


def _place_heads(
    kv_index: list[int], group: int, new_group: int, units: NewUnits, drawn: IntVector | None
) -> list[int]:
    """Fill every slot of every new group with an old query head of the group's own kv head, or FRESH.

    Slots beyond the first copies take the group's heads in turn, or those in ``drawn``.
    """
    placed: dict[int, int] = {}
    heads: list[int] = []
    for kv in kv_index:
        for _ in range(new_group):
            slot = placed.get(kv, 0)
            placed[kv] = slot + 1
            is_fresh = kv == FRESH or (units != "copy" and slot >= group)
            inside = slot % group if slot < group or drawn is None else int(drawn[len(heads)])
            heads.append(FRESH if is_fresh else kv * group + inside)
    return heads


def _check_head_counts(old: tuple[int, int], new: tuple[int, int]) -> None:
    (heads, kv_heads), (new_heads, new_kv_heads) = old, new
    if new_heads < heads or new_kv_heads < kv_heads:
        raise GrowthError(
            f"target.num_attention_heads {new_heads}, num_key_value_heads {new_kv_heads}: smaller than the source's "
            f"{heads}, {kv_heads}; growth only adds."
        )
    fitting = fitting_kv_heads(old, new_heads)
    if new_kv_heads not in fitting:
        shown = ", ".join(map(str, fitting)) or "none: choose more query heads"
        queries = ", ".join(map(str, fitting_heads(old, new_kv_heads)))
        raise GrowthError(
            f"target.num_key_value_heads: {new_kv_heads} with {new_heads} query heads cannot hold the source's {kv_heads} "
            f"groups of {heads // kv_heads}: each old group must fit into new groups of its own kv head. "
            f"num_attention_heads that work with {new_kv_heads} kv heads: {queries}, ...; "
            f"num_key_value_heads that work with {new_heads} query heads: {shown}."
        )


def _floats(vector: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in vector)
