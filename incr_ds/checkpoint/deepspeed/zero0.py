"""Reads ZeRO-0: one file holds a module and its optimizer, which numbers its parameters and does not name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import State, check_dtype
from incr_ds.checkpoint.deepspeed.partition import FlatParameter, FlatShards, Piece
from incr_ds.checkpoint.deepspeed.schema import (
    AdamState,
    ModelStates,
    Moments,
    MomentsError,
    adam_state,
    masters,
    moments,
)
from incr_ds.checkpoint.naming import plain_names, refuse_adapters
from incr_ds.errors import CheckpointError

_PROBED = 4096  # elements of a master that are compared to distinguish tensors of one shape


@dataclass(frozen=True)
class Unpartitioned:
    """The content of one rank of ZeRO-0, in which every parameter is a group of its own.

    ``no_moments`` is the reason why the optimizer's state cannot be used, if so. The weights are then the module's own.
    """

    shards: FlatShards
    dtype: torch.dtype
    step: int
    hyperparameters: tuple[Mapping[str, Any], ...]
    no_moments: str | None = None


@dataclass(frozen=True)
class _Slot:
    """A parameter as the optimizer stores it: its number, its moments, and its fp32 master if it has one."""

    number: int
    state: Moments
    master: torch.Tensor | None

    def may_be(self, weight: torch.Tensor) -> bool:
        """Whether the slot can belong to a module weight: equal shapes, and equal values if there is a master."""
        if self.state["exp_avg"].shape != weight.shape:
            return False
        if self.master is None:
            return True
        probe = self.master.flatten()[:_PROBED]
        return torch.equal(probe.to(weight.dtype), weight.flatten()[:_PROBED])


def unpartitioned(
    path: Path, model: ModelStates, architecture: Architecture, no_moments: str | None = None
) -> Unpartitioned:
    """Read the module's weights, and match the optimizer's numbered parameters with their names.

    Within a parameter group the optimizer keeps the module's order. Shapes (and the masters' values, in reduced precision)
    must then leave exactly one possibility. Otherwise the optimizer's state is not used, since moments under a wrong name
    would go unnoticed. With ``no_moments``, the reason why another rank's state cannot be used, only weights are read.
    Raises CheckpointError for what is not supported.
    """
    module = model.get("module")
    if not module:
        raise CheckpointError(
            f"{path}: no ZeRO optimizer files here, and no module with its optimizer. A pipeline without ZeRO is not "
            "supported: save with ZeRO-1, or export the model to Hugging Face format."
        )
    refuse_adapters(module, str(path))
    aliases = {spec.name for spec in architecture.tensors if spec.tied_to is not None}
    logical, buffers = plain_names(module, architecture), set(model.get("buffer_names") or ())
    weights = {name: tensor for name, tensor in module.items() if logical[name] not in aliases and name not in buffers}
    for name, weight in weights.items():
        check_dtype(weight.dtype, name, str(path))
    dtype = next(iter(weights.values())).dtype
    if no_moments is None:
        try:
            return _with_moments(path, model, weights, dtype)
        except MomentsError as error:
            no_moments = f"{error}; weights are the module's, in {dtype}"
    return Unpartitioned(_shards_of_weights(weights), dtype, 0, (), no_moments)


def _with_moments(
    path: Path, model: ModelStates, weights: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Unpartitioned:
    optimizer = model.get("optimizer")
    if not isinstance(optimizer, dict) or not optimizer:
        raise MomentsError(
            f"{path.name} holds a module without its optimizer, and no ZeRO optimizer files are beside it"
        )
    groups = _slots(path, optimizer)
    shards = _shards(weights, _match(path, weights, groups))
    state = _adam(path, optimizer)
    hyperparameters = tuple({k: v for k, v in group.items() if k != "params"} for group in state["param_groups"])
    return Unpartitioned(shards, dtype, _step(path, groups), hyperparameters)


def _adam(path: Path, optimizer: Mapping[str, Any]) -> AdamState:
    return adam_state(optimizer.get("optimizer_state_dict", optimizer), path, "optimizer")


def _slots(path: Path, optimizer: Mapping[str, Any]) -> list[list[_Slot]]:
    if "fp32_groups_flat" in optimizer:
        raise MomentsError(
            f"{path.name}: ZeRO-0 with a fused fp16 optimizer flattens its parameters without their names, which is not "
            "supported (save with ZeRO-1)"
        )
    state = _adam(path, optimizer)
    saved = optimizer.get("fp32_groups")
    held = masters(saved, path, "optimizer.fp32_groups") if saved is not None else None
    groups = []
    for index, group in enumerate(state["param_groups"]):
        slots = []
        for place, number in enumerate(group["params"]):
            found = moments(state["state"].get(number, {}), path, f"optimizer parameter {number}")
            for key in ("exp_avg", "exp_avg_sq"):
                check_dtype(found[key].dtype, f"{key} of optimizer parameter {number}", str(path))
            slots.append(_Slot(number, found, held[index][place] if held is not None else None))
        groups.append(slots)
    return groups


def _match(path: Path, weights: Mapping[str, torch.Tensor], groups: Sequence[Sequence[_Slot]]) -> dict[str, _Slot]:
    """Match names with slots: each of the module's names is the next slot of some group, or frozen.

    A name is frozen only if there are fewer slots than names. The search goes through the names in the module's order. A
    state is the position in every group. For each state it keeps the number of ways to reach it (at most two, since two
    already mean "ambiguous") and one of them. So its cost grows with the number of states instead of the number of ways.
    """
    num_frozen = len(weights) - sum(map(len, groups))
    start = (0,) * (len(groups) + 1)
    ways: dict[tuple[int, ...], tuple[int, Any]] = {start: (1, None)}
    for name, weight in weights.items():
        following: dict[tuple[int, ...], tuple[int, Any]] = {}
        for position, (count, trail) in ways.items():
            for index, group in enumerate(groups):
                if position[index] < len(group) and group[position[index]].may_be(weight):
                    _add(following, position, index, count, (name, group[position[index]], trail))
            if position[-1] < num_frozen:
                _add(following, position, len(groups), count, (name, None, trail))
        ways = following
    final = (*(len(group) for group in groups), max(0, num_frozen))
    count, trail = ways.get(final, (0, None))
    if count != 1:
        why = "none of the module's orders matches" if count == 0 else "more than one of the module's orders matches"
        raise MomentsError(
            f"{path.name}: ZeRO-0's optimizer numbers {sum(map(len, groups))} parameters in {len(groups)} group(s) without "
            f"names, and {why} (save with ZeRO-1)"
        )
    found = {}
    while trail is not None:
        name, slot, trail = trail
        if slot is not None:
            found[name] = slot
    return found


def _add(
    ways: dict[tuple[int, ...], tuple[int, Any]], position: tuple[int, ...], index: int, count: int, trail: Any
) -> None:
    after = (*position[:index], position[index] + 1, *position[index + 1 :])
    already = ways.get(after, (0, None))[0]
    ways[after] = (min(2, already + count), trail)


def _shards(weights: Mapping[str, torch.Tensor], slots: Mapping[str, _Slot]) -> FlatShards:
    order = sorted(weights, key=lambda name: name not in slots)  # trained ones first, since frozen ones have no moments
    parameters, flat = {}, {state: [] for state in ("weight", "exp_avg", "exp_avg_sq")}  # type: ignore[var-annotated]
    for number, name in enumerate(order):
        weight = weights[name]
        parameters[name] = FlatParameter(tuple(weight.shape), (Piece(0, number, 0, weight.numel()),))
        slot = slots.get(name)
        master = slot.master if slot is not None and slot.master is not None else weight
        flat["weight"].append(master.flatten())
        if slot is not None:
            flat["exp_avg"].append(slot.state["exp_avg"].flatten())
            flat["exp_avg_sq"].append(slot.state["exp_avg_sq"].flatten())
    one_rank: Mapping[State, Sequence[Sequence[torch.Tensor]]] = {state: [flat[state]] for state in flat}  # type: ignore[misc]
    return FlatShards(parameters, one_rank, frozenset(weights) - frozenset(slots))


def _shards_of_weights(weights: Mapping[str, torch.Tensor]) -> FlatShards:
    parameters = {
        name: FlatParameter(tuple(weight.shape), (Piece(0, number, 0, weight.numel()),))
        for number, (name, weight) in enumerate(weights.items())
    }
    return FlatShards(parameters, {"weight": [[weight.flatten() for weight in weights.values()]]})


def _step(path: Path, groups: Sequence[Sequence[_Slot]]) -> int:
    steps = sorted({int(slot.state["step"]) for group in groups for slot in group})
    if len(steps) != 1:
        raise CheckpointError(
            f"{path}: the optimizer's parameters are at different steps: {', '.join(map(str, steps))}."
        )
    return steps[0]
