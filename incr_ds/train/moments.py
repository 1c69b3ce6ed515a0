"""Copies a rank's share of a checkpoint's masters, Adam moments and Muon's momentum into DeepSpeed's ZeRO partitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from incr_ds.checkpoint.base import STATES, LogicalCheckpoint, State
from incr_ds.checkpoint.streaming import Part, Slices, StreamedTensor, block_parts
from incr_ds.sharding.blocks import RankParameter


@dataclass(frozen=True)
class _PartitionPlace:
    """Elements [start, stop) of a rank's parameter, at ``offset`` in a flat tensor of partition number ``group``."""

    group: int
    offset: int
    start: int
    stop: int


def fill_optimizer(optimizer: Any, parameters: Mapping[RankParameter, Tensor], checkpoint: LogicalCheckpoint) -> None:
    """Fill every partition on this rank with the masters, moments and step of ``checkpoint``. Reads only what it holds.

    ``optimizer`` is DeepSpeed's for ZeRO-1, 2 or 3. DeepSpeed's own mapping says where a parameter is in a partition, so no
    order of parameters is assumed. A checkpoint with moments must be of the same optimizer, tensor by tensor.
    """
    slices = Slices(checkpoint.read)
    flats = _reset(optimizer, checkpoint.facts.step or 0)
    place_of = _place_scattered if _is_stage3(optimizer) else _place_contiguous
    for shard, parameter in parameters.items():
        place = place_of(optimizer, parameter)
        if place is None:  # no part of it on this rank
            continue
        for state in checkpoint.facts.states_of(shard.tensor.name):  # missing moments stay zero
            here = _place_whole(optimizer, parameter, place.group) if state == "momentum_buffer" else place
            parts = block_parts(shard.blocks, shard.shape, state, here.start, here.stop)
            _fill(flats[here.group][state].narrow(0, here.offset, here.stop - here.start), parts, slices)


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def _masters(optimizer: Any) -> list[tuple[Tensor, Mapping[str, Any]]]:
    """Every flat partition with its parameter group."""
    groups = optimizer.optimizer.param_groups
    if not _is_stage3(optimizer):
        masters = optimizer.single_partition_of_fp32_groups
        return [(master, next(g for g in groups if any(item is master for item in g["params"]))) for master in masters]
    numbers = optimizer.sub_group_to_group_id  # between steps, ZeRO-3's groups list no parameters
    masters = optimizer.fp32_partitioned_groups_flat
    return [(master, groups[numbers[number]]) for number, master in enumerate(masters)]


def _place_contiguous(_: Any, parameter: Any) -> _PartitionPlace | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    inside, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    return _PartitionPlace(mapping.param_group_index, there.start, inside.start, inside.start + inside.numel)


def _place_scattered(optimizer: Any, parameter: Any) -> _PartitionPlace | None:
    """Find a rank's part of a ZeRO-3 parameter. Every rank has an equal share, and the last ones are padded with zeros."""
    group, offset, share = optimizer.grad_position[parameter.ds_id]
    start = parameter.ds_zero_partition_rank * share
    stop = min(start + share, parameter.ds_numel)
    return _PartitionPlace(group, offset, start, stop) if start < stop else None


def _place_whole(optimizer: Any, parameter: Any, group: int) -> _PartitionPlace:
    """Where Muon's momentum of a parameter is: each rank has that of its partition's parameters whole, one after the other."""
    before = takewhile(lambda other: other is not parameter, optimizer.params_in_partition[group])
    return _PartitionPlace(group, sum(other.numel() for other in before), 0, parameter.numel())


def _reset(optimizer: Any, step: int) -> list[dict[State, Tensor]]:
    """Zero the moments of every flat partition at ``step``. Returns the tensors to fill, by state."""
    flats: list[dict[State, Tensor]] = []
    for number, (master, group) in enumerate(_masters(optimizer)):
        if group.get("use_muon"):
            moments = _no_momentum(optimizer.params_in_partition[number], master)
            optimizer.optimizer.state[master] = dict(moments)
        else:
            on_device = group.get("fused") or group.get("capturable")
            counter = torch.tensor(float(step), device=master.device if on_device else "cpu")
            moments = {state: torch.zeros_like(master) for state in STATES[1:]}
            named = {str(state): moment for state, moment in moments.items()}
            optimizer.optimizer.state[master] = {"step": counter, **named}
        flats.append({"weight": master.data, **moments})
    return flats


def _no_momentum(parameters: Sequence[Tensor], master: Tensor) -> dict[State, Tensor]:
    """Zeros for Muon's momentum of ``parameters``; {} without any. DeepSpeed converts it to the dtype of gradients."""
    size = sum(parameter.numel() for parameter in parameters)
    return {"momentum_buffer": torch.zeros(size, dtype=master.dtype, device=master.device)} if size else {}


def _fill(destination: Tensor, parts: tuple[Part, ...], slices: Slices) -> None:
    position = 0
    for block in slices.blocks(StreamedTensor((destination.numel(),), torch.float32, parts)):
        destination[position : position + block.numel()].copy_(block)
        position += block.numel()
