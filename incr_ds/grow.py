"""The offline story in one place: open the source, plan, write every file of the target, publish."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from incr_ds.advice import FILE as ADVICE_FILE
from incr_ds.advice import advice_text, advise, source_training
from incr_ds.arch.architecture import Architecture
from incr_ds.arch.dynamics import FILE as DYNAMICS_FILE
from incr_ds.arch.dynamics import UNCHANGED, Dynamics, dynamics_text, read_dynamics, without_multipliers
from incr_ds.arch.logical import STATES, CheckpointFacts, LogicalCheckpoint, State
from incr_ds.arch.modules import check_modules, modules_of, padded_vocabulary
from incr_ds.config.fields import load_settings
from incr_ds.config.growth import GrowthRecipe, TargetLayout
from incr_ds.errors import CheckpointError, GrowthError
from incr_ds.growth.apply import BYTES_PER_ELEMENT, GrownTensors
from incr_ds.growth.gradients import gradient_norm_ratio
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.planner import plan_growth
from incr_ds.integrity import check_file
from incr_ds.source import open_source
from incr_ds.target.budget import anonymous_bytes, portion_elements
from incr_ds.target.commit import flush, listed_files, refuse_existing, write_atomically
from incr_ds.target.deepspeed import ADAMW_DEFAULTS, NativeTarget, native_files
from incr_ds.target.files import Slices, TargetFile, tensor_bytes, write_file
from incr_ds.target.huggingface import SafetensorsFile, config_text, huggingface_files, index_text
from incr_ds.target.placement import check_layout
from incr_ds.target.universal import universal_files
from incr_ds.target.workspace import Workspace, open_workspace
from incr_ds.target.zero3 import zero3_files

TAG = "grown"
MEMORY_BUDGET = 2 << 30
FLUSHING = 4  # threads that wait for the disk while others write: the disk takes several files at once
FILE_OVERHEAD = 64 << 10  # at most: pickle, headers and directory of one file, beside its tensors
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class GrowthRequest:
    """What to grow into what: the source folder, the recipe and the output folder.

    ``workers`` threads write files; ``memory_budget`` bounds the anonymous memory of the process, in bytes.
    ``overwrite`` lets the output replace a checkpoint that was published there.
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
        return sum(tensor_bytes(file) for file in self.files)

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
        described = self.plan.to_json() + dynamics_text(self.dynamics)
        digest = hashlib.blake2b(described.encode(), digest_size=8)
        for path in self.source.facts.files:
            status = path.stat()
            digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def plan_request(request: GrowthRequest) -> PlannedGrowth:
    """Open the source and plan everything; nothing is written. Raises IncrError for whatever cannot be done."""
    recipe = load_settings(request.recipe, GrowthRecipe)
    source = open_source(request.source, request.tag, request.config, trust=request.trust)
    return plan_files(request, source, recipe)


def plan_files(request: GrowthRequest, source: LogicalCheckpoint, recipe: GrowthRecipe) -> PlannedGrowth:
    """Plan the growth of an opened source, and the files of the layout that the recipe asks for."""
    plan = plan_growth(source.architecture, recipe, str(request.recipe))
    dynamics = grown_dynamics(plan, read_dynamics(request.source))
    layout = recipe.layout
    if layout.format == "huggingface":
        dtype = _dtype(layout.dtype, "float32")
        return PlannedGrowth(request, source, plan, huggingface_files(plan.target, dtype), dtype, dynamics)
    check_layout(plan.target, layout)
    _check_moments(source, recipe)
    dtype = _dtype(layout.dtype, str(source.facts.metadata.get("dtype", "float32")))
    target = _native_target(source, plan, dtype)
    return PlannedGrowth(request, source, plan, _target_files(target, layout), dtype, dynamics)


def grown_dynamics(plan: GrowthPlan, earlier: Mapping[str, Dynamics]) -> dict[str, Dynamics]:
    """The AdamW multipliers of the target's tensors, where they are not 1; ``earlier`` are the source's own.

    ``optimizer: exact`` multiplies them by the plan's, ``keep`` and ``reset-new`` keep them, ``reset`` drops them.
    """
    mode = plan.recipe.optimizer
    if mode == "reset":
        return {}
    found = {}
    for name, tensor in plan.tensors.items():
        before = earlier.get(tensor.source, UNCHANGED)
        found[name] = plan.nearest_dynamics(name).after(before) if mode == "exact" else before
    return {name: own for name, own in found.items() if own != UNCHANGED}


def _target_files(target: NativeTarget, layout: TargetLayout) -> tuple[TargetFile, ...]:
    if layout.format == "universal":
        return universal_files(target)
    return zero3_files(target, layout.sub_group_size) if layout.zero_stage == 3 else native_files(target)


class GrownCheckpoint:
    """A growth as a logical checkpoint: each read computes the slice that it asks for; nothing is written.

    ``dynamics`` are the AdamW multipliers of its tensors.
    """

    def __init__(self, plan: GrowthPlan, source: LogicalCheckpoint, dynamics: Mapping[str, Dynamics]) -> None:
        self.plan, self.dynamics = plan, dynamics
        self._source, self._grown = source, GrownTensors(plan, source)
        self._architecture = plan.target
        reset = plan.recipe.optimizer == "reset"
        kind = f"{source.facts.kind}, grown on load"
        step = 0 if reset else source.facts.step
        self._facts = replace(source.facts, kind=kind, states=STATES, step=step, layout={})

    @property
    def facts(self) -> CheckpointFacts:
        """The source's, except the kind and the step."""
        return self._facts

    @property
    def architecture(self) -> Architecture:
        """The grown model."""
        return self._architecture

    def read(self, name: str, state: State = "weight", rows: slice | None = None) -> torch.Tensor:
        """Rows of one grown tensor, at least fp32."""
        spec = self._architecture.by_name[name]
        first, stop, _ = (rows or slice(None)).indices(spec.shape[0])
        columns = ((0, size) for size in spec.shape[1:])
        return self._grown.read(spec.tied_to or name, state, ((first, stop), *columns))

    def self_check(self) -> Iterator[str]:
        """The source's own check."""
        return self._source.self_check()


def open_grown(source: Path, recipe: Path, tag: str | None = None) -> tuple[GrownCheckpoint, GrowthRecipe]:
    """Open ``source`` as it would be after growth by ``recipe``. Raises IncrError for whatever cannot be done."""
    settings = load_settings(recipe, GrowthRecipe)
    opened = open_source(source, tag)
    _check_moments(opened, settings)
    plan = plan_growth(opened.architecture, settings, str(recipe))
    return GrownCheckpoint(plan, opened, grown_dynamics(plan, read_dynamics(source))), settings


def grow_checkpoint(planned: PlannedGrowth, progress: Progress | None = None) -> Mapping[str, Any]:
    """Write and publish the target; returns the manifest's facts. The output appears whole or not at all.

    An interrupted run goes on where it stopped, and ends with the same bytes. CheckpointError if the disk is full or
    fails; what was finished is then kept for the next run.
    """
    report = progress or (lambda phase, done, total: None)
    request = planned.request
    refuse_existing(request.output, overwrite=request.overwrite)
    slices = Slices(GrownTensors(planned.plan, planned.source).read, planned.portion)
    with _resumable(request.output), open_workspace(request.output, planned.key, overwrite=request.overwrite) as space:
        _check_room(planned, space)
        hashes, ratio = _run_jobs(planned, space, slices, report)
        facts = _facts(planned, hashes)
        _write_companions(planned, space.folder, ratio)
        space.publish(f"{planned.plan.recipe.layout.format} checkpoint, grown", facts)
    return facts


def _run_jobs(
    planned: PlannedGrowth, space: Workspace, slices: Slices, report: Progress
) -> tuple[dict[Path, str], float | None]:
    """Check the source, hash its files and write the target's, ``workers`` jobs at a time.

    Returns the hashes, and the ratio of the gradients' norms where the plan grows something and it is known.
    """
    files = [file for file in planned.files if file.path not in space.done]
    with _pool(planned.request.workers) as pool, _pool(FLUSHING) as flushing:
        listed = listed_files(planned.request.source)
        hashing = {path: pool.submit(check_file, path, listed.get(path)) for path in planned.source.facts.files}
        checking = pool.submit(_check_source, planned.source, report)
        measuring = pool.submit(_gradient_ratio, planned)
        writing = {pool.submit(write_file, file, space.folder, slices): file.path for file in files}
        finished: SimpleQueue[Future[Any]] = SimpleQueue()
        for job in (checking, measuring, *hashing.values(), *writing):
            job.add_done_callback(finished.put)
        flushed: dict[Future[None], tuple[str, Mapping[str, Any]]] = {}
        for _ in range(2 + len(hashing) + 2 * len(files)):
            job = finished.get()
            result = job.result()
            if job in writing:
                waiting = flushing.submit(flush, space.folder / writing[job])
                flushed[waiting] = (writing[job], result)
                waiting.add_done_callback(finished.put)
            elif job in flushed:
                space.record(*flushed[job])
                report("writing", len(space.done), len(planned.files))
        return {path: job.result() for path, job in hashing.items()}, measuring.result()


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
        raise CheckpointError(
            f"{output}: {error.strerror or error} ({error.filename or 'while writing'}); nothing was published. Finished "
            "files are kept beside it: the same command goes on from there."
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
    check_modules(modules, target.architecture, layout.tensor_parallel, f"layout.modules: {layout.modules}")
    vocab = target.architecture.sizes["vocab"]
    vocabulary = padded_vocabulary(vocab, layout.vocabulary_multiple, layout.tensor_parallel)
    return replace(target, modules=modules, vocabulary=vocabulary)


def _frozen_note(frozen: Sequence[str]) -> tuple[str, ...]:
    if not frozen:
        return ()
    more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    return (f"frozen in the source, so without moments (zero in the target): {', '.join(frozen[:3])}{more}",)


def _check_moments(source: LogicalCheckpoint, recipe: GrowthRecipe) -> None:
    if recipe.optimizer != "reset" and "exp_avg" not in source.facts.states:
        raise GrowthError(
            f"{source.facts.path}: a {source.facts.kind} source has no Adam moments, and optimizer: {recipe.optimizer} needs "
            "them; set optimizer: reset in the recipe."
        )


def _check_room(planned: PlannedGrowth, space: Workspace) -> None:
    """Disk space and file count, before the first byte; what an interrupted run wrote counts."""
    disk = os.statvfs(space.folder)
    written = sum(int(digest["bytes"]) for digest in space.done.values())
    needed = planned.num_bytes + FILE_OVERHEAD * len(planned.files) - written
    free = disk.f_bavail * disk.f_frsize
    output = planned.request.output
    if needed > free:
        raise CheckpointError(f"{output}: needs {needed:,} bytes, {free:,} are free on its disk; nothing was written.")
    entries = len({Path(file.path).parent for file in planned.files}) + len(planned.files) - len(space.done)
    if disk.f_files and entries > disk.f_favail:
        raise CheckpointError(f"{output}: needs {entries:,} files, its disk allows {disk.f_favail:,} more.")


def _check_source(source: LogicalCheckpoint, report: Progress) -> None:
    total = len(source.architecture.stored)
    for done, _ in enumerate(source.self_check()):
        report("checking the source", min(done + 1, total), total)


def _facts(planned: PlannedGrowth, hashes: Mapping[Path, str]) -> dict[str, Any]:
    source, plan = planned.source, planned.plan
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "exact": plan.exact,
        "notes": list(planned.notes),
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
        },
    }


def _write_companions(planned: PlannedGrowth, folder: Path, ratio: float | None) -> None:
    """Everything beside the tensors: config, index or latest, the plan, the recipe, advice for training, the tokenizer."""
    write_atomically(folder / "config.json", config_text(planned.plan.target, planned.dtype))
    write_atomically(folder / "growth_plan.json", planned.plan.to_json())
    shutil.copyfile(planned.request.recipe, folder / "growth_recipe.yaml")
    if planned.dynamics:
        write_atomically(folder / DYNAMICS_FILE, dynamics_text(planned.dynamics))
    if advice := advice_text(
        advise(planned.plan, source_training(planned.request.source, planned.source.facts), ratio)
    ):
        write_atomically(folder / ADVICE_FILE, advice)
    shards = tuple(file for file in planned.files if isinstance(file, SafetensorsFile))
    if not shards:
        universal = planned.plan.recipe.layout.format == "universal"
        write_atomically(folder / ("latest_universal" if universal else "latest"), TAG)
    elif (index := index_text(shards)) is not None:
        write_atomically(folder / "model.safetensors.index.json", index)
    for name in TOKENIZER_FILES:
        if (planned.request.source / name).is_file():
            shutil.copyfile(planned.request.source / name, folder / name)


def _gradient_ratio(planned: PlannedGrowth) -> float | None:
    return gradient_norm_ratio(planned.plan, planned.source) if planned.plan.grows else None


def _dtype(asked: str, otherwise: str) -> torch.dtype:
    name = otherwise if asked == "auto" else asked
    found: torch.dtype = getattr(torch, name)
    return found
