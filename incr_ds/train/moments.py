"""A rank's share of a checkpoint's masters and Adam moments, put into DeepSpeed's flat ZeRO-1 and 2 partitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from incr_ds.arch.logical import STATES, LogicalCheckpoint, State
from incr_ds.errors import ConfigError
from incr_ds.target.files import Bounds, Part, Slices, StreamedTensor
from incr_ds.target.placement import ShardedTensor


def fill_optimizer(
    optimizer: Any, parameters: Mapping[ShardedTensor, Tensor], checkpoint: LogicalCheckpoint, zero_stage: int
) -> None:
    """Give every partition on this rank the masters, moments and step of ``checkpoint``, reading only what it holds.

    ``optimizer`` is DeepSpeed's. Where a parameter lies in a partition is taken from DeepSpeed's own mapping, so no
    order of parameters is assumed. ConfigError for ZeRO-3, whose partitions have no such mapping.
    """
    if zero_stage == 3:
        raise ConfigError(
            "layout.zero_stage 3: moments cannot be filled in on load, which a growth on load, another model.freeze and "
            "optimizer.multipliers need; use zero_stage 1 or 2, set model.load_optimizer: false, or grow to disk with format: "
            "universal."
        )
    masters = list(optimizer.single_partition_of_fp32_groups)
    flats = [_reset(optimizer.optimizer, master, checkpoint.facts.step or 0) for master in masters]
    slices = Slices(_reader(checkpoint))
    for shard, parameter in parameters.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]  # None: no part of it on this rank
        if mapping is None:
            continue
        inside, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        for state, flat in flats[mapping.param_group_index].items():
            part = Part(shard.tensor.name, state, shard.bounds, inside.start, inside.start + inside.numel)
            _fill(flat.narrow(0, there.start, there.numel), part, slices)


def _reset(optimizer: torch.optim.Optimizer, master: Tensor, step: int) -> dict[State, Tensor]:
    """Zero moments at ``step`` for one flat partition; returns the tensors to fill, by state."""
    group = next(group for group in optimizer.param_groups if any(item is master for item in group["params"]))
    on_device = group.get("fused") or group.get("capturable")
    counter = torch.tensor(float(step), device=master.device if on_device else "cpu")
    moments = {state: torch.zeros_like(master) for state in STATES[1:]}
    optimizer.state[master] = {"step": counter, **moments}
    return {"weight": master.data, **moments}


def _fill(destination: Tensor, part: Part, slices: Slices) -> None:
    position = 0
    for block in slices.blocks(StreamedTensor((destination.numel(),), torch.float32, (part,))):
        destination[position : position + block.numel()].copy_(block)
        position += block.numel()


def _reader(checkpoint: LogicalCheckpoint) -> Any:
    def read(name: str, state: State, bounds: Bounds) -> Tensor:
        rows, *columns = (slice(*part) for part in bounds)
        return checkpoint.read(name, state, rows)[(slice(None), *columns)]

    return read
