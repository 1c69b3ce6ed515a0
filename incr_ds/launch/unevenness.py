"""Sizes that a layout accepts but cuts unevenly, with the nearest sizes that divide."""

from __future__ import annotations

from collections.abc import Iterator

from incr_ds.arch.architecture import Architecture
from incr_ds.config.training import RunSettings


def uneven(architecture: Architecture, run: RunSettings) -> Iterator[str]:
    """One sentence for each size that does not divide."""
    layout = run.layout
    for axis in ("vocab", "ffn"):
        size, field = architecture.sizes[axis], architecture.family.axes[axis]
        if size % layout.tensor_parallel:
            parts = f"{-(-size // layout.tensor_parallel):,} and {size // layout.tensor_parallel:,}"
            yield (
                f"{field} {size:,} over {layout.tensor_parallel} tensor ranks: parts of {parts}; "
                f"nearest that divides: {_nearest(size, layout.tensor_parallel)}"
            )
    if layout.stages == "even" and architecture.num_layers % layout.pipeline_parallel:
        count, depth = architecture.num_layers, layout.pipeline_parallel
        fitting = [degree for degree in range(1, count + 1) if count % degree == 0]
        near = sorted(sorted(fitting, key=lambda degree: abs(degree - depth))[:2])
        yield (
            f"{count} layers over {depth} pipeline stages: {-(-count // depth)} and {count // depth} layers; nearest "
            f"pipeline_parallel that divides: {' or '.join(map(str, near))}; nearest number of layers: {_nearest(count, depth)}"
        )
    fewest = min(run.accumulations)
    if fewest < layout.pipeline_parallel:
        need = layout.pipeline_parallel * run.batch.micro_batch_size * layout.data_parallel
        yield (
            f"{fewest} micro-batches in {layout.pipeline_parallel} pipeline stages: some stages always wait; "
            f"batch.global_batch_size {need:,} or more fills the pipeline"
        )
    yield from _rounded_gpu_sizes(architecture, layout.tensor_parallel)


def _rounded_gpu_sizes(architecture: Architecture, tensor_parallel: int) -> Iterator[str]:
    """Matrix products are slow where a GPU's tile of 64 elements is not filled."""
    for axis in ("hidden", "ffn"):
        size = architecture.sizes[axis]
        part = -(-size // tensor_parallel) if axis == "ffn" else size
        if part > 64 and part % 8:
            yield (
                f"{architecture.family.axes[axis]} {size:,} gives a rank {part:,} columns, not a multiple of 8, which GPUs "
                f"multiply slowly; nearest: {_nearest(size, 8 * (tensor_parallel if axis == 'ffn' else 1))}"
            )


def _nearest(size: int, unit: int) -> str:
    lower = size // unit * unit
    return " or ".join(f"{found:,}" for found in (lower, lower + unit) if found)
