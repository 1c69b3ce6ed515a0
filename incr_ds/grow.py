"""The offline story in one place: open the source, plan, write every file of the target, publish."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from incr_ds.advice import FILE as ADVICE_FILE
from incr_ds.advice import advice_text, advise, source_training
from incr_ds.arch.dynamics import FILE as DYNAMICS_FILE
from incr_ds.arch.dynamics import Dynamics, dynamics_text, read_dynamics, without_multipliers
from incr_ds.arch.logical import LogicalCheckpoint
from incr_ds.arch.modules import check_modules, modules_of, padded_vocabulary
from incr_ds.companions import TOKENIZER_FILES as TOKENIZER_FILES
from incr_ds.companions import companions, copy_companions
from incr_ds.config.growth import GrowthRecipe, TargetLayout
from incr_ds.crew import ALONE, Crew, StoppedError, agree, shares
from incr_ds.errors import CheckpointError, GrowthError
from incr_ds.growth.apply import BYTES_PER_ELEMENT, GrownTensors
from incr_ds.growth.changes import load_recipe
from incr_ds.growth.dynamics import grown_dynamics
from incr_ds.growth.gradients import gradient_norm_ratio
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.planner import plan_growth
from incr_ds.integrity import check_file, open_described
from incr_ds.source.finite import FiniteCheckpoint, nonfinite_notes
from incr_ds.target.budget import anonymous_bytes, check_disk, portion_elements
from incr_ds.target.commit import flush, listed_files, refuse_existing, refuse_overlap, write_atomically
from incr_ds.target.deepspeed import ADAMW_DEFAULTS, NativeTarget, native_files
from incr_ds.target.files import Slices, TargetFile, tensor_bytes, write_file
from incr_ds.target.huggingface import (
    SafetensorsFile,
    config_text,
    huggingface_files,
    index_text,
    published_config_text,
)
from incr_ds.target.placement import check_layout
from incr_ds.target.releases import TESTED, needs_bare_states
from incr_ds.target.universal import universal_files
from incr_ds.target.workspace import Workspace, open_workspace
from incr_ds.target.zero3 import zero3_files

TAG = "grown"
MEMORY_BUDGET = 2 << 30
FLUSHING = 4  # threads that wait for the disk while others write: the disk takes several files at once
FILE_OVERHEAD = 64 << 10  # at most: pickle, headers and directory of one file, beside its tensors
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GrowthRequest:
    """What to grow into what: the source folder, the recipe and the output folder.

    ``workers`` threads write files; ``memory_budget`` bounds the anonymous memory of the process, in bytes.
    ``overwrite`` lets the output replace a checkpoint that was published there. ``target_deepspeed`` is the release that will
    load the target. ``allow_nonfinite`` grows a source that holds NaN or infinity.
    """

    source: Path
    recipe: Path
    output: Path
    tag: str | None = None
    config: Path | None = None
    workers: int = 1
    trust: bool = False
    memory_budget: int = MEMORY_BUDGET
    overwrite: bool = False
    target_deepspeed: str = TESTED
    allow_nonfinite: bool = False


@dataclass(frozen=True)
class PlannedGrowth:
    """An opened source, its plan, every file that the target will have, and the AdamW multipliers of its tensors."""

    request: GrowthRequest
    source: LogicalCheckpoint
    plan: GrowthPlan
    files: tuple[TargetFile, ...]
    dtype: torch.dtype
    dynamics: Mapping[str, Dynamics] = field(default_factory=dict)

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(self.sizes.values())

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of tensor data in each file, by its path."""
        return {file.path: tensor_bytes(file) for file in self.files}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the plan and of the source."""
        frozen = self.source.facts.metadata.get("frozen") or ()
        return (*self.plan.notes, *self.source.facts.metadata.get("notes", ()), *_frozen_note(frozen))

    @property
    def portion(self) -> int:
        """Elements that each worker asks for at once. ConfigError if the memory budget is too small for the plan."""
        rows = [spec.shape[-1] for model in (self.plan.source, self.plan.target) for spec in model.stored]
        request = self.request
        return portion_elements(request.memory_budget, request.workers, max(rows), BYTES_PER_ELEMENT, anonymous_bytes())

    @property
    def key(self) -> str:
        """Stands for everything that decides the bytes of the target."""
        described = self.plan.to_json() + dynamics_text(self.dynamics) + self.request.target_deepspeed
        digest = hashlib.blake2b(described.encode(), digest_size=8)
        for path in self.source.facts.files:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def plan_request(request: GrowthRequest) -> PlannedGrowth:
    """Open the source and plan everything; nothing is written. Raises IncrError for whatever cannot be done."""

    def opened() -> LogicalCheckpoint:
        return open_described(request.source, request.tag, request.config, trust=request.trust)

    recipe, source = load_recipe(request.recipe, lambda: opened().architecture), opened()
    refuse_overlap(request.source, request.output)
    companions(request.source)  # what is copied at the end is there
    return plan_files(request, source, recipe)


def plan_files(request: GrowthRequest, source: LogicalCheckpoint, recipe: GrowthRecipe) -> PlannedGrowth:
    """Plan the growth of an opened source, and the files of the layout that the recipe asks for."""
    plan = plan_growth(source.architecture, recipe, str(request.recipe))
    dynamics = grown_dynamics(plan, read_dynamics(request.source))
    layout = recipe.layout
    if layout.format == "huggingface":
        dtype = _dtype(layout.dtype, "float32")
        return PlannedGrowth(request, source, plan, huggingface_files(plan.target, dtype), dtype, dynamics)
    _check_layout(plan, str(request.recipe))
    check_moments(source, recipe)
    dtype = _dtype(layout.dtype, str(source.facts.metadata.get("dtype", "float32")))
    bare = needs_bare_states(request.target_deepspeed, layout.format == "universal", layout.zero_stage)
    # Only this release was seen to load files without a state.
    has_moments = recipe.optimizer != "reset" or request.target_deepspeed != TESTED
    target = replace(_native_target(source, plan, dtype), bare_states=bare, has_moments=has_moments)
    return PlannedGrowth(request, source, plan, _target_files(target, layout), dtype, dynamics)


def _check_layout(plan: GrowthPlan, recipe: str) -> None:
    """LayoutError, naming the recipe, if the target cannot be cut as it says, by its training code."""
    layout = plan.recipe.layout
    check_layout(plan.target, layout, f"{recipe}: layout")
    if layout.modules != "own":
        where = f"{recipe}: layout.modules: {layout.modules}"
        check_modules(modules_of(layout.modules), plan.target, layout.tensor_parallel, where)


def _target_files(target: NativeTarget, layout: TargetLayout) -> tuple[TargetFile, ...]:
    if layout.format == "universal":
        return universal_files(target)
    return zero3_files(target, layout.sub_group_size) if layout.zero_stage == 3 else native_files(target)


def grow_checkpoint(planned: PlannedGrowth, progress: Progress | None = None, crew: Crew = ALONE) -> Mapping[str, Any]:
    """Write and publish the target; returns the manifest's facts. The output appears whole or not at all.

    Every process of ``crew`` calls this with the same plan; each writes files of its own, and the first one publishes.
    An interrupted run goes on where it stopped, with any number of processes, and ends with the same bytes.
    CheckpointError if the disk is full or fails; what was finished is then kept for the next run.
    """
    report = progress or (lambda phase, done, total: None)
    with _resumable(planned.request.output), ExitStack() as stack:
        space = _open_together(planned, crew, stack)
        otherwise, allowed = "--allow-nonfinite grows this one as it is", planned.request.allow_nonfinite
        watched = FiniteCheckpoint(planned.source, otherwise=otherwise, allowed=allowed)
        if space.done:  # files of a run that was cut off: what they were made of is not read again
            agree(crew, lambda: watched.look_at(planned.plan.reads[crew.rank :: crew.size]))
        slices = Slices(GrownTensors(planned.plan, watched).read, agree(crew, lambda: planned.portion))
        hashes, ratio = agree(crew, lambda: _run_jobs(planned, space, slices, report, crew))
        for others, done, found in crew.gather((hashes, space.done, watched.found)):
            hashes.update(others)
            space.done.update(done)
            watched.found.update(found)
        facts = _facts(planned, hashes, watched.found)
        agree(crew, lambda: _publish(planned, space, facts, ratio) if crew.rank == 0 else None)
    return facts


def _open_together(planned: PlannedGrowth, crew: Crew, stack: ExitStack) -> Workspace:
    """The first process opens and locks the workspace; the others write into it."""
    request, key = planned.request, planned.key

    def open_first() -> Workspace:
        if crew.rank:
            return Workspace(request.output, key, crew.rank)
        refuse_existing(request.output, overwrite=request.overwrite)
        opened = stack.enter_context(open_workspace(request.output, key, overwrite=request.overwrite))
        _check_room(planned, opened)
        return opened

    space = agree(crew, open_first)
    keys, done = zip(*crew.gather((key, space.done)), strict=True)
    if len(set(keys)) > 1:
        other = next(rank for rank, found in enumerate(keys) if found != keys[0])
        raise CheckpointError(
            f"{request.source}: process {other} of {crew.size} sees other files (sizes or times) there, or another recipe, than "
            "process 0; all must see the same folders."
        )
    return Workspace(request.output, key, crew.rank, done[0]) if crew.rank else space


def _publish(planned: PlannedGrowth, space: Workspace, facts: Mapping[str, Any], ratio: float | None) -> None:
    _write_companions(planned, space.folder, ratio)
    space.publish(f"{planned.plan.recipe.layout.format} checkpoint, grown", facts)


def _run_jobs(
    planned: PlannedGrowth, space: Workspace, slices: Slices, report: Progress, crew: Crew
) -> tuple[dict[Path, str], float | None]:
    """Check the source, hash its files and write the target's, this process' share of it, ``workers`` jobs at a time.

    Returns the hashes and, in the first process, the ratio of the gradients' norms where it is known.
    """
    files, inputs, checks = _own_share(planned, space, crew)
    with _pool(planned.request.workers) as pool, _pool(FLUSHING) as flushing, space.recording():
        listed = listed_files(planned.request.source)
        hashing = {path: pool.submit(check_file, path, listed.get(path)) for path in inputs}
        checking = [pool.submit(_check_source, planned.source, report)] if checks else []
        measuring = [] if crew.rank else [pool.submit(gradient_norm_ratio, planned.plan, planned.source)]
        writing = {pool.submit(write_file, file, space.folder, slices): file.path for file in files}
        finished: SimpleQueue[Future[Any]] = SimpleQueue()
        for job in (*checking, *measuring, *hashing.values(), *writing):
            job.add_done_callback(finished.put)
        flushed: dict[Future[None], tuple[str, Mapping[str, Any]]] = {}
        total = len(space.done) + len(files)
        for _ in range(len(checking) + len(measuring) + len(hashing) + 2 * len(files)):
            job = finished.get()
            result = job.result()
            if crew.has_failed():
                raise StoppedError
            if job in writing:
                waiting = flushing.submit(flush, space.folder / writing[job])
                flushed[waiting] = (writing[job], result)
                waiting.add_done_callback(finished.put)
            elif job in flushed:
                space.record(*flushed[job])
                report("writing", len(space.done), total)
        ratio = measuring[0].result() if measuring else None
        return {path: job.result() for path, job in hashing.items()}, ratio


def _own_share(planned: PlannedGrowth, space: Workspace, crew: Crew) -> tuple[list[TargetFile], list[Path], bool]:
    """What this process writes, what it reads for checksums, and whether it checks the source: by bytes, the same in all."""
    files = [file for file in planned.files if file.path not in space.done]
    inputs = planned.source.facts.files
    read = [path.stat().st_size for path in inputs]
    sizes = [*(planned.sizes[file.path] for file in files), *read, sum(read)]
    own = shares(sizes, crew.size)[crew.rank]
    last = len(files) + len(inputs)
    return (
        [files[job] for job in own if job < len(files)],
        [inputs[job - len(files)] for job in own if len(files) <= job < last],
        last in own,
    )


@contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads, because all that takes time (copies, arithmetic, checksums, writes) runs outside Python's lock, and threads
    share one process's memory. One thread of torch each; what waits is cancelled when a job fails."""
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _resumable(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        kept = any(output.parent.glob(f".{output.name}.incomplete-*"))
        more = " Finished files are kept beside it: the same command goes on from there." if kept else ""
        raise CheckpointError(
            f"{output}: {error.strerror or error} ({error.filename or 'while writing'}); nothing was published.{more}"
        ) from error


def _native_target(source: LogicalCheckpoint, plan: GrowthPlan, dtype: torch.dtype) -> NativeTarget:
    metadata = source.facts.metadata
    step = 0 if plan.recipe.optimizer == "reset" else source.facts.step or 0
    saved = [without_multipliers(group) for group in metadata.get("optimizer_groups") or ()]
    groups = tuple(sorted(saved, key=lambda group: -float(group["weight_decay"]))) or (
        ADAMW_DEFAULTS,
        {**ADAMW_DEFAULTS, "weight_decay": 0.0},
    )
    global_steps = int(metadata.get("global_steps", 0))
    target = NativeTarget(plan.target, plan.recipe.layout, dtype, TAG, step, global_steps, groups)
    return _in_modules(target, plan.recipe.layout)


def _in_modules(target: NativeTarget, layout: TargetLayout) -> NativeTarget:
    """The target for another training code, if the layout names one."""
    if layout.modules == "own":
        return target
    modules = modules_of(layout.modules)
    vocab = target.architecture.sizes["vocab"]
    vocabulary = padded_vocabulary(vocab, layout.vocabulary_multiple, layout.tensor_parallel)
    return replace(target, modules=modules, vocabulary=vocabulary)


def _frozen_note(frozen: Sequence[str]) -> tuple[str, ...]:
    if not frozen:
        return ()
    more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    return (f"frozen in the source, so without moments (zero in the target): {', '.join(frozen[:3])}{more}",)


def check_moments(source: LogicalCheckpoint, recipe: GrowthRecipe) -> None:
    """GrowthError if the recipe needs Adam's moments and the source has none."""
    if recipe.optimizer != "reset" and "exp_avg" not in source.facts.states:
        why = f" ({source.facts.no_moments})" if source.facts.no_moments else ""
        raise GrowthError(
            f"{source.facts.path}: a {source.facts.kind} source has no Adam moments{' to use' if why else ''}{why}, and "
            f"optimizer: {recipe.optimizer} needs them; set optimizer: reset in the recipe."
        )


def _check_room(planned: PlannedGrowth, space: Workspace) -> None:
    """Disk space and file count, before the first byte; what an interrupted run wrote counts."""
    written = sum(int(digest["bytes"]) for digest in space.done.values())
    needed = planned.num_bytes + FILE_OVERHEAD * len(planned.files) - written
    entries = len({Path(file.path).parent for file in planned.files}) + len(planned.files) - len(space.done)
    check_disk(space.folder, needed, entries, str(planned.request.output))


def _check_source(source: LogicalCheckpoint, report: Progress) -> None:
    # More are checked than there are tensors where ranks hold copies or parts: the last is reported once all are.
    phase, total = "checking the source", len(source.architecture.stored)
    for done, _ in enumerate(source.self_check()):
        report(phase, min(done + 1, total - 1), total)
    report(phase, total, total)


def _facts(planned: PlannedGrowth, hashes: Mapping[Path, str], nonfinite: Mapping[str, int]) -> dict[str, Any]:
    source, plan = planned.source, planned.plan
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "exact": plan.exact,
        "notes": [*planned.notes, *nonfinite_notes(nonfinite)],
        "source": {
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


def _write_companions(planned: PlannedGrowth, folder: Path, ratio: float | None) -> None:
    """Everything beside the tensors: config, index or latest, the plan, the recipe, advice for training, the tokenizer."""
    shards = tuple(file for file in planned.files if isinstance(file, SafetensorsFile))
    config = (published_config_text if shards else config_text)(planned.plan.target, planned.dtype)
    write_atomically(folder / "config.json", config)
    write_atomically(folder / "growth_plan.json", planned.plan.to_json())
    shutil.copyfile(planned.request.recipe, folder / "growth_recipe.yaml")
    if planned.dynamics:
        write_atomically(folder / DYNAMICS_FILE, dynamics_text(planned.dynamics))
    if planned.plan.target.family.trains:
        training = source_training(planned.request.source, planned.source.facts)
        if advice := advice_text(advise(planned.plan, training, ratio)):
            write_atomically(folder / ADVICE_FILE, advice)
    if not shards:
        universal = planned.plan.recipe.layout.format == "universal"
        write_atomically(folder / ("latest_universal" if universal else "latest"), TAG)
    elif (index := index_text(shards)) is not None:
        write_atomically(folder / "model.safetensors.index.json", index)
    copy_companions(planned.request.source, folder)


def _dtype(asked: str, otherwise: str) -> torch.dtype:
    name = otherwise if asked == "auto" else asked
    found: torch.dtype = getattr(torch, name)
    return found
