"""Runs a planned growth: checks the source, writes every file of the target, and publishes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.finite import FiniteCheckpoint, nonfinite_notes
from incr_ds.checkpoint.integrity import check_file
from incr_ds.checkpoint.publish import flush, listed_files, refuse_existing
from incr_ds.checkpoint.streaming import Slices, TargetFile, write_file
from incr_ds.checkpoint.workspace import Workspace, open_workspace
from incr_ds.errors import CheckpointError
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.gradients import gradient_norm_ratio
from incr_ds.offline.grown_files import write_companions
from incr_ds.offline.memory_budget import check_disk
from incr_ds.offline.plan import PlannedGrowth
from incr_ds.offline.process_group import SINGLE_PROCESS, ProcessGroup, agree, on_first, shares
from incr_ds.offline.stages import Stages, job_threads

FLUSHING = 4  # threads that wait for the disk while others write, since a disk can flush several files at once
FILE_OVERHEAD = 64 << 10  # at most: pickle, headers and directory of a file, besides its tensors
Progress = Callable[[str, int, int], None]


def grow_checkpoint(
    planned: PlannedGrowth, progress: Progress | None = None, group: ProcessGroup = SINGLE_PROCESS
) -> Mapping[str, Any]:
    """Write and publish the target, and return the manifest's facts. The output appears whole or not at all.

    Every process of ``group`` calls this with the same plan. Each writes its own files, and the first one publishes. An
    interrupted run continues where it stopped, with any number of processes, and ends with the same bytes. Raises
    CheckpointError if the disk is full or fails; finished files are then kept for the next run.
    """
    report = progress or (lambda phase, done, total: None)
    with _resumable(planned.request.output), ExitStack() as stack:
        space = _open_together(planned, group, stack)
        otherwise, allowed = "--allow-nonfinite grows this one as it is", planned.request.allow_nonfinite
        watched = FiniteCheckpoint(planned.source, otherwise=otherwise, allowed=allowed)
        if space.done:  # files of an interrupted run: the tensors that they were made from are not read again
            agree(group, lambda: watched.look_at(planned.reads[group.rank :: group.size]))
        slices = Slices(GrownTensors(planned.plan, watched).read, agree(group, lambda: planned.portion))
        hashes, ratio = agree(group, lambda: _run_jobs(planned, space, slices, report, group))
        for others, done, found in group.gather((hashes, space.done, watched.found)):
            hashes.update(others)
            space.done.update(done)
            watched.found.update(found)
        facts = _facts(planned, hashes, watched.found)
        on_first(group, lambda: _publish(planned, space, facts, ratio))
    return facts


def _open_together(planned: PlannedGrowth, group: ProcessGroup, stack: ExitStack) -> Workspace:
    """Open and lock the workspace in the first process; the others write into it."""
    request, key = planned.request, planned.key

    def open_first() -> Workspace:
        if group.rank:
            return Workspace(request.output, key, group.rank)
        refuse_existing(request.output, overwrite=request.overwrite)
        opened = stack.enter_context(open_workspace(request.output, key, overwrite=request.overwrite))
        _check_room(planned, opened)
        return opened

    space = agree(group, open_first)
    keys, done = zip(*group.gather((key, space.done)), strict=True)
    if len(set(keys)) > 1:
        other = next(rank for rank, found in enumerate(keys) if found != keys[0])
        raise CheckpointError(
            f"{request.source}: rank {other} of {group.size} sees other files (sizes or times) there, or another recipe, than "
            "rank 0; all must see the same folders."
        )
    return Workspace(request.output, key, group.rank, done[0]) if group.rank else space


def _publish(planned: PlannedGrowth, space: Workspace, facts: Mapping[str, Any], ratio: float | None) -> None:
    write_companions(planned, space.folder, ratio)
    space.publish(f"{planned.plan.recipe.layout.format} checkpoint, grown", facts)


def _run_jobs(
    planned: PlannedGrowth, space: Workspace, slices: Slices, report: Progress, group: ProcessGroup
) -> tuple[dict[Path, str], float | None]:
    """Do this process' share: check the source, hash its files and write the target's, ``workers`` jobs at a time.

    Returns the hashes and, in the first process, the ratio of the gradients' norms if it is known.
    """
    files, inputs, checks = _own_share(planned, space, group)
    total = len(space.done) + len(files)
    hashes: dict[Path, str] = {}
    ratios: list[float | None] = []
    with job_threads(planned.request.workers) as working, job_threads(FLUSHING) as flushing, space.recording():
        stages = Stages(group.has_failed)

        def written(file: TargetFile, digest: Mapping[str, Any]) -> None:
            stages.start(flushing, partial(flushed, file, digest), flush, space.folder / file.path)

        def flushed(file: TargetFile, digest: Mapping[str, Any], _: None) -> None:
            space.record(file.path, digest)
            report("writing", len(space.done), total)

        listed = listed_files(planned.request.source)
        for path in inputs:
            stages.start(working, partial(hashes.__setitem__, path), check_file, path, listed.get(path))
        if checks:
            stages.start(working, None, _check_source, planned.source, report)
        if group.rank == 0:
            stages.start(working, ratios.append, gradient_norm_ratio, planned.plan, planned.source)
        for file in files:
            stages.start(working, partial(written, file), write_file, file, space.folder, slices)
        stages.finish()
    return hashes, ratios[0] if ratios else None


def _own_share(
    planned: PlannedGrowth, space: Workspace, group: ProcessGroup
) -> tuple[list[TargetFile], list[Path], bool]:
    """Files that this process writes, files that it hashes, and whether it checks the source. Shares are equal in bytes."""
    files = [file for file in planned.files if file.path not in space.done]
    inputs = planned.source.facts.files
    read = [path.stat().st_size for path in inputs]
    sizes = [*(planned.sizes[file.path] for file in files), *read, sum(read)]
    own = shares(sizes, group.size)[group.rank]
    last = len(files) + len(inputs)
    return (
        [files[job] for job in own if job < len(files)],
        [inputs[job - len(files)] for job in own if len(files) <= job < last],
        last in own,
    )


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = any(output.parent.glob(f".{output.name}.incomplete-*"))
        more = " Finished files are kept beside it: the same command continues from there." if kept else ""
        raise CheckpointError(
            f"{output}: {error.strerror or error} ({error.filename or 'while writing'}); nothing was published.{more}"
        ) from error


def _check_room(planned: PlannedGrowth, space: Workspace) -> None:
    """Check disk space and number of files before the first byte. What an interrupted run wrote counts as free."""
    written = sum(int(digest["bytes"]) for digest in space.done.values())
    needed = planned.num_bytes + FILE_OVERHEAD * len(planned.files) - written
    entries = len({Path(file.path).parent for file in planned.files}) + len(planned.files) - len(space.done)
    check_disk(space.folder, needed, entries, str(planned.request.output))


def _check_source(source: LogicalCheckpoint, report: Progress) -> None:
    # If ranks hold copies or parts, more is checked than there are tensors. The last one is reported once all are done.
    phase, total = "checking the source", len(source.architecture.stored)
    for done, _ in enumerate(source.self_check()):
        report(phase, min(done + 1, total - 1), total)
    report(phase, total, total)


def _facts(planned: PlannedGrowth, hashes: Mapping[Path, str], nonfinite: Mapping[str, int]) -> dict[str, Any]:
    source, plan = planned.source, planned.plan
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "function_preserving": plan.function_preserving,
        "notes": [*planned.notes, *nonfinite_notes(nonfinite)],
        "source": {
            "folder": str(planned.request.source.resolve()),
            "kind": source.facts.kind,
            "step": source.facts.step,
            "parameters": source.architecture.num_parameters,
            "files": {path.name: {"bytes": path.stat().st_size, "xxh3": hash} for path, hash in hashes.items()},
        },
        "target": {
            "parameters": plan.target.num_parameters,
            "dtype": str(planned.dtype).removeprefix("torch."),
            "tensor_bytes": planned.num_bytes,
            "deepspeed": planned.request.target_deepspeed,
        },
    }
