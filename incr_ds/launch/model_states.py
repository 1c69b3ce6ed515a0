"""Bytes of weights, fp32 masters, moments and gradients on a rank, partitioned as DeepSpeed 0.19.8 does. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.optimizer_groups import is_apart
from incr_ds.sharding.partition_sizes import partition_size, share_size, whole_sizes

FP32 = 4
MOMENTS = 2  # exp_avg and exp_avg_sq
ELEMENT = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a weight, by the run file's precision
_COMMUNICATED = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}


@dataclass(frozen=True)
class ZeroSettings:
    """DeepSpeed's settings that decide what ZeRO holds. Sizes are in elements; the defaults are DeepSpeed's.

    ``overlap_comm`` None is on for stage 3 only. ``optimizer_on_host`` and ``parameters_on_host`` say what is offloaded,
    ``accumulates`` whether a step has several micro-batches.
    """

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    sub_group_size: int = 1_000_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    communicated_bytes: int | None = None
    optimizer_on_host: bool = False
    accumulates: bool = False
    parameters_on_host: bool = False


def zero_settings(config: Mapping[str, Any]) -> ZeroSettings:
    """The settings in DeepSpeed's ``config``, as ``deepspeed_config`` returns it."""
    section = config["zero_optimization"]
    numbers = {
        name: int(section.get(f"stage3_{name}", section.get(name, default)))
        for name, default in vars(ZeroSettings()).items()
        if type(default) is int
    }
    return ZeroSettings(
        **numbers,
        overlap_comm=section.get("overlap_comm"),
        contiguous_gradients=section.get("contiguous_gradients", True),
        communicated_bytes=_COMMUNICATED.get(config.get("communication_data_type") or ""),
        accumulates=config["gradient_accumulation_steps"] > 1,
        optimizer_on_host=_is_offloaded(section, "offload_optimizer") or bool(section.get("cpu_offload")),
        parameters_on_host=_is_offloaded(section, "offload_param") or bool(section.get("cpu_offload_param")),
    )


@dataclass(frozen=True)
class StateMemory:
    """Bytes on one rank between two steps, and two that come and go.

    ``buffers`` are those that DeepSpeed communicates with during forward and backward, gathered parameters of stage 3
    included. ``update`` is the fp32 gradient while the optimizer takes its step, when no activations exist. An optimizer on
    the host keeps it, for all groups, and with ZeRO-1 and 2 its new weights and accumulated gradients beside it.
    """

    weights: int
    masters: int
    moments: int
    gradients: int
    buffers: int
    update: int


def model_states(
    groups: Sequence[Sequence[RankParameter]],
    frozen: Sequence[RankParameter],
    *,
    zero_stage: int,
    data_parallel: int,
    element: int,
    settings: ZeroSettings,
    optimizer: str = "adamw",
) -> StateMemory:
    """Count a rank that trains the parameter ``groups`` of the optimizer and holds ``frozen`` parameters beside them.

    ``element`` is the number of bytes of a weight and of its gradient. ``optimizer`` is optimizer.name.
    """
    if zero_stage == 3:
        return _scattered(groups, frozen, data_parallel, element, settings)
    numbers = [sum(parameter.numel for parameter in group) for group in groups]
    still = sum(parameter.numel for parameter in frozen) * element
    if zero_stage == 0:
        trained = sum(numbers)
        masters = trained * FP32 if element < FP32 else 0
        return StateMemory(
            trained * element + still,
            masters,
            trained * FP32 * MOMENTS,
            trained * element,
            0,
            masters and trained * FP32,
        )
    parts = [partition_size(number, data_parallel) for number in numbers]
    on_host = sum(parts) * (FP32 + element) + (sum(numbers) * element if settings.accumulates else 0)
    return StateMemory(
        weights=sum(parts) * data_parallel * element + still,
        masters=sum(parts) * FP32,
        moments=sum(
            max(momentum_sizes(group, data_parallel)) * element
            if is_apart(optimizer, group[0].tensor)
            else part * FP32 * MOMENTS
            for group, part in zip(groups, parts, strict=True)
        ),
        gradients=(sum(parts) if zero_stage == 2 else sum(numbers)) * element,
        buffers=_bucket(settings, element, double=bool(settings.overlap_comm)) if settings.contiguous_gradients else 0,
        update=on_host if settings.optimizer_on_host else max(parts) * FP32,
    )


def momentum_sizes(group: Sequence[RankParameter], data_parallel: int) -> list[int]:
    """Elements of Muon's momentum on each data-parallel rank, in the dtype of gradients."""
    return whole_sizes([parameter.shape for parameter in group], data_parallel)


def _scattered(
    groups: Sequence[Sequence[RankParameter]],
    frozen: Sequence[RankParameter],
    data_parallel: int,
    element: int,
    settings: ZeroSettings,
) -> StateMemory:
    """ZeRO-3: every parameter is spread over the ranks by itself. Small ones are whole on every rank as well."""
    trained = [parameter for group in groups for parameter in group]
    everything = [parameter.numel for parameter in (*trained, *frozen)]
    shares = sum(share_size(parameter.numel, data_parallel) for parameter in trained)
    still = sum(share_size(parameter.numel, data_parallel) for parameter in frozen)
    small = sum(number for number in everything if number <= settings.param_persistence_threshold)
    gathered = min(sum(everything) - small, settings.max_live_parameters)
    bucket = _bucket(settings, element, double=False) if settings.contiguous_gradients else 0
    return StateMemory(
        weights=(shares + still + small) * element,
        masters=shares * FP32,  # a copy also in fp32: DeepSpeed means to share it, but compares a device with its name
        moments=shares * FP32 * MOMENTS,
        gradients=shares * element,
        buffers=bucket + gathered * element,
        update=(shares if settings.optimizer_on_host else min(shares, settings.sub_group_size)) * FP32,
    )


def _bucket(settings: ZeroSettings, element: int, *, double: bool) -> int:
    """Bytes of the buffers in which gradients are reduced. DeepSpeed allocates them whole, whatever the model's size."""
    return settings.reduce_bucket_size * (settings.communicated_bytes or element) * (2 if double else 1)


def _is_offloaded(section: Mapping[str, Any], name: str) -> bool:
    return (section.get(name) or {}).get("device", "none") in ("cpu", "nvme")
