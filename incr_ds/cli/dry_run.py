"""Prints a dry run: the resolved settings and every number that follows from them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import yaml
from rich import box
from rich.table import Table

from incr_ds.cli.command import console, print_json
from incr_ds.launch.dry_run import SECONDS_PER_HOUR, DryRun, RunPart, largest
from incr_ds.launch.rank_plan import PipelineStage

# The columns of a memory table, in their order.
_KINDS = ("weights", "masters", "moments", "gradients", "buffers", "activations", "loss", "teacher", "update")
_UNITS = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
ASSUMED = (
    "weights, masters and moments are counted as DeepSpeed 0.19.8 allocates them, learning-rate multipliers aside; the other "
    "kinds are estimates, for attention without stored scores unless attention is eager, and transformers' layers",
    "memory of CUDA, NCCL and the allocator's fragmentation is not counted; leave 5 to 10 % of a GPU free",
    "FLOPs count neither recomputation nor evaluation",
)


def show_dry_run(found: DryRun, *, json: bool) -> None:
    """Print ``found`` as tables, or as one JSON object."""
    if json:
        print_json(_content(found))
        return
    print(yaml.safe_dump(found.run.model_dump(mode="json"), sort_keys=False))
    for part in found.parts:
        console.print(_part_table(part, several=len(found.parts) > 1))
        console.print(_parameter_table(part))
        console.print(_memory_table(part))
        console.print(f"largest: stage {largest(part).number}; {_checkpointing_text(part)}")
        for note in part.notes:
            console.print(f"does not divide: {note}", markup=False)
    console.print(_run_table(found))
    for use in found.data:
        console.print(str(use), markup=False)
    for line in found.missing:
        console.print(f"not on this machine, and checked again when the run starts: {line}", markup=False)
    for line in ASSUMED:
        console.print(f"assumed: {line}", markup=False)


def _part_table(part: RunPart, *, several: bool) -> Table:
    run, layout, batch = part.run, part.run.layout, part.run.batch
    title = f"stage {part.number}: " if several else ""
    rows = {
        "steps": f"{run.schedule.start_step + 1:,} to {run.schedule.last_step:,}",
        "parameters": f"{part.architecture.num_parameters:,}" + (", tied embeddings" if part.architecture.tied else ""),
        "ranks": f"{layout.world_size:,} = tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data "
        f"{layout.data_parallel}, ZeRO-{layout.zero_stage}",
        "global batch": f"{_sizes_text(part)} micro-batches of "
        f"{batch.micro_batch_size} on {layout.data_parallel} data-parallel ranks",
        "tokens": f"{'' if batch.ramp else f'{part.tokens_per_step:,} a step, '}{part.tokens:,} in all",
        "FLOPs": f"{part.student_flops:.3e}, {part.student_flops / part.tokens:.3e} a token",
        **_teacher_rows(part),
        **({"pipeline bubble": f"{part.bubble:.1%} of a step"} if layout.pipeline_parallel > 1 else {}),
        "checkpoint": f"{_size(part.checkpoint.num_bytes)} in {part.checkpoint.files:,} files",
    }
    table = Table(
        title=f"{title}{part.architecture.family.model_type}", title_justify="left", show_header=False, box=box.SIMPLE
    )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _sizes_text(part: RunPart) -> str:
    """Samples and micro-batches of a step, for every size of the global batch."""
    sizes = zip(part.spans, part.run.accumulations, strict=True)
    if len(part.spans) == 1:
        return "".join(f"{size:,} samples = {count:,}" for (_, size), count in sizes)
    return ", ".join(f"{size:,} samples = {count:,} in {steps:,} steps" for (steps, size), count in sizes) + ";"


def _teacher_rows(part: RunPart) -> dict[str, str]:
    if part.teacher is None:
        return {}
    share = part.teacher_flops / part.flops
    text = f"{part.teacher.num_parameters:,} parameters, runs in {part.taught_steps:,} of {part.steps:,} steps"
    return {"teacher": f"{text}: {part.teacher_flops:.3e} FLOPs, {share:.1%} of all"}


def _parameter_table(part: RunPart) -> Table:
    """Parameters of every pipeline stage and of its ranks."""
    table = Table(box=box.SIMPLE_HEAD, title="work and parameters by pipeline stage", title_justify="left")
    for heading in ("stage", "decoder layers", "FLOPs a token", "parameters", "of a tensor rank"):
        table.add_column(heading, justify="right")
    for stage in part.pipeline:
        (first, stop), (least, most) = stage.layers, (min(stage.rank_parameters), max(stage.rank_parameters))
        ranks = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        flops = f"{stage.flops:.3e}"
        table.add_row(str(stage.number), f"{first} to {stop - 1}", flops, f"{stage.parameters:,}", ranks)
    return table


def _memory_table(part: RunPart) -> Table:
    """Bytes on a rank of every pipeline stage, in the unit of the largest."""
    unit, factor = _unit(largest(part).memory.total)
    kinds = [kind for kind in _KINDS if any(stage.memory.kinds[kind] for stage in part.pipeline)]
    host = set(part.pipeline[0].memory.on_host)
    table = Table(box=box.SIMPLE_HEAD, title=f"memory of a rank by pipeline stage, {unit}", title_justify="left")
    for heading in (
        "stage",
        *(f"{kind} (host)" if kind in host else kind for kind in kinds),
        "total",
        *(["on the host"] if host else []),
    ):
        table.add_column(heading, justify="right")
    for stage in part.pipeline:
        sizes = [*(stage.memory.kinds[kind] for kind in kinds), stage.memory.total]
        sizes += [stage.memory.host_total] if host else []
        table.add_row(str(stage.number), *(f"{size / factor:,.2f}" for size in sizes))
    return table


def _checkpointing_text(part: RunPart) -> str:
    """What the run's other choice of activation checkpointing would mean for the largest rank."""
    memory = largest(part).memory
    if memory.recomputes:
        text, other = "without activation checkpointing", memory.activations_kept
    else:
        text, other = "with activation checkpointing", memory.activations_recomputed
    return f"{text}: activations {_size(other)} instead of {_size(memory.activations)} on that stage's ranks"


def _run_table(found: DryRun) -> Table:
    disk = found.disk
    rows = {
        "tokens": f"{found.tokens:,}",
        "FLOPs": f"{found.flops:.3e}, teachers included",
        "largest rank": _size(max(largest(part).memory.total for part in found.parts)),
        "checkpoints": f"{disk.saved:,} saved, {disk.left:,} left at the end: {_size(disk.left_bytes)}; at most {disk.peak:,} at "
        f"once: {_size(disk.peak_bytes)} in {disk.peak_files:,} files",
        "time": _time_text(found),
    }
    table = Table(title="the run", title_justify="left", show_header=False, box=box.SIMPLE)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _time_text(found: DryRun) -> str:
    if found.speed is None or found.seconds is None or found.gpu_hours is None:
        return "not stated; --mfu and --peak-tflops assume a speed"
    hours = found.seconds / SECONDS_PER_HOUR
    length = f"{hours:,.2f} hours" if hours < 48 else f"{hours / 24:,.1f} days"
    return (
        f"{length}, {found.gpu_hours:,.1f} GPU hours, assuming {found.speed.mfu:.0%} of {found.speed.peak_flops / 1e12:,.0f} "
        "TFLOP/s on every device; loading, evaluation and saving not counted"
    )


def _unit(number: int) -> tuple[str, int]:
    """The largest unit in which ``number`` bytes are at least 1, and its bytes."""
    return next(((unit, factor) for unit, factor in _UNITS if number >= factor), ("bytes", 1))


def _size(number: int) -> str:
    """Bytes in a readable unit."""
    unit, factor = _unit(number)
    return f"{number / factor:,.2f} {unit}" if factor > 1 else f"{number:,} {unit}"


def _content(found: DryRun) -> dict[str, Any]:
    speed = (
        None if found.speed is None else {**asdict(found.speed), "seconds": found.seconds, "gpu_hours": found.gpu_hours}
    )
    return {
        "run": found.run.model_dump(mode="json"),
        "stages": [_part_content(part) for part in found.parts],
        "tokens": found.tokens,
        "flops": found.flops,
        "largest_rank_bytes": max(largest(part).memory.total for part in found.parts),
        "checkpoints": asdict(found.disk),
        "data": [asdict(use) for use in found.data],
        "assumed_speed": speed,
        "missing_here": list(found.missing),
        "assumptions": list(ASSUMED),
    }


def _part_content(part: RunPart) -> dict[str, Any]:
    return {
        "stage": part.number,
        "first_step": part.run.schedule.start_step,
        "last_step": part.run.schedule.last_step,
        "model_type": part.architecture.family.model_type,
        "parameters": part.architecture.num_parameters,
        "layout": {**part.run.layout.model_dump(), "world_size": part.run.layout.world_size},
        "accumulation_steps": part.run.accumulation_steps,
        "global_batch_size": part.spans[0][1],
        "batch_sizes": [{"steps": steps, "global_batch_size": size} for steps, size in part.spans],
        "tokens_per_step": part.tokens_per_step,
        "tokens": part.tokens,
        "flops": {"student": part.student_flops, "teacher": part.teacher_flops},
        "teacher": None
        if part.teacher is None
        else {"parameters": part.teacher.num_parameters, "steps": part.taught_steps},
        "pipeline_bubble": part.bubble,
        "checkpoint": asdict(part.checkpoint),
        "does_not_divide": list(part.notes),
        "pipeline_stages": [_stage_content(stage) for stage in part.pipeline],
    }


def _stage_content(stage: PipelineStage) -> dict[str, Any]:
    memory = stage.memory
    return {
        "stage": stage.number,
        "decoder_layers": list(stage.layers),
        "flops_per_token": stage.flops,
        "parameters": stage.parameters,
        "parameters_by_tensor_rank": list(stage.rank_parameters),
        "memory_bytes": {
            **memory.kinds,
            "activations_without_checkpointing": memory.activations_kept,
            "activations_with_checkpointing": memory.activations_recomputed,
            "total": memory.total,
            "host_total": memory.host_total,
            "on_host": list(memory.on_host),
        },
    }
