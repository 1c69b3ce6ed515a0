"""How large a run's checkpoints are, and how many of them are on disk at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from incr_ds.config.training import CheckpointSettings, RunSettings
from incr_ds.launch.activations import shape_of
from incr_ds.launch.model_states import FP32, MOMENTS, momentum_sizes
from incr_ds.launch.rank_plan import Holdings, RankHoldings
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.optimizer_groups import is_apart
from incr_ds.sharding.partition_sizes import partition_size, share_size

# latest, config.json, manifest.json, and zero_to_fp32.py and zero_to_torch.py by DeepSpeed; a tokenizer's files come besides
_COMPANIONS = 5


@dataclass(frozen=True)
class CheckpointSize:
    """One checkpoint: ``num_bytes`` of tensors in ``files`` files."""

    num_bytes: int
    files: int


@dataclass(frozen=True)
class OnDisk:
    """A run's checkpoints: how many are saved, left at the end, and there at once, the one being written included.

    ``peak_bytes`` and ``peak_files`` are the most at once.
    """

    saved: int
    left: int
    left_bytes: int
    peak: int
    peak_bytes: int
    peak_files: int


def checkpoint_size(run: RunSettings, held: Holdings) -> CheckpointSize:
    """One checkpoint in the run's layout, as DeepSpeed writes it. ``held`` are the run's holdings."""
    layout, element = run.layout, shape_of(run).element
    ranks = [rank for stage in held for rank in stage]
    optimizer = sum(_optimizer_bytes(run, rank) for rank in ranks)
    if layout.zero_stage == 3:  # weights are in the masters, except frozen ones
        weights = sum(_scattered(rank.frozen, layout.data_parallel) for rank in ranks)
    else:
        weights = sum(rank.numel for rank in ranks)
    model_files = layout.world_size if layout.zero_stage == 3 else len(ranks)
    layer_files = _layer_files(held) if layout.pipeline_parallel > 1 else 0
    return CheckpointSize(weights * element + optimizer, model_files + layer_files + layout.world_size + _COMPANIONS)


def saved_steps(settings: CheckpointSettings, first: int, last: int, growths: Sequence[int]) -> list[int]:
    """The steps at which a run from ``first`` to ``last`` saves: every interval, at keep_steps, growths and the end."""
    regular = range(first // settings.interval * settings.interval + settings.interval, last + 1, settings.interval)
    return sorted({step for step in (*regular, *settings.keep_steps, *growths, last) if first < step <= last})


def on_disk(
    settings: CheckpointSettings, steps: Sequence[int], growths: Sequence[int], sizes: Sequence[CheckpointSize]
) -> OnDisk:
    """Follow the run's saves at ``steps``, whose checkpoints have ``sizes``, one each. ``growths`` are steps of growths.

    What the model was grown from stays until the next growth.
    """
    kept: list[int] = []
    for_good = {index for index, step in enumerate(steps) if step in settings.keep_steps}
    peak, peak_bytes, peak_files = 0, 0, 0
    for index, step in enumerate(steps):
        there = [*kept, index]
        peak = max(peak, len(there))
        peak_bytes = max(peak_bytes, sum(sizes[one].num_bytes for one in there))
        peak_files = max(peak_files, sum(sizes[one].files for one in there))
        newest = set(there[-settings.keep_last :]) if settings.keep_last else set(there)
        source = max((growth for growth in growths if growth < step), default=None)
        kept = [one for one in there if one in newest | for_good or steps[one] == source]
    left = sum(sizes[one].num_bytes for one in kept)
    return OnDisk(len(steps), len(kept), left, peak, peak_bytes, peak_files)


def _optimizer_bytes(run: RunSettings, held: RankHoldings) -> int:
    """Masters and optimizer states that the data-parallel ranks of a model-parallel rank save together."""
    return sum(_group_bytes(run, group) for group in held.groups)


def _group_bytes(run: RunSettings, group: Sequence[RankParameter]) -> int:
    ranks = run.layout.data_parallel
    if run.layout.zero_stage == 3:
        return _scattered(group, ranks) * FP32 * (1 + MOMENTS)
    elements = partition_size(sum(shard.numel for shard in group), ranks) * ranks
    if is_apart(run.optimizer.name, group[0].tensor):
        return elements * FP32 + sum(momentum_sizes(group, ranks)) * shape_of(run).element
    return elements * FP32 * (1 + MOMENTS)


def _scattered(parameters: Sequence[RankParameter], ranks: int) -> int:
    return sum(share_size(parameter.numel, ranks) * ranks for parameter in parameters)


def _layer_files(held: Holdings) -> int:
    """A pipeline writes one file for each of its layers that has parameters and for each tensor rank; a tied head has none."""
    layers = {
        (rank, parameter.pipeline_layer)
        for stage in held
        for rank, one in enumerate(stage)
        for parameter in one.parameters
    }
    return len(layers)
