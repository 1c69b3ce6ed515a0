"""The offline story in one place: open the source, plan, write every file of the target, publish."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from incr_ds.arch.logical import LogicalCheckpoint
from incr_ds.config.fields import load_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import CheckpointError, GrowthError
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.plan import GrowthPlan
from incr_ds.growth.planner import plan_growth
from incr_ds.source import open_source
from incr_ds.target.commit import MANIFEST, hash_file, publish, refuse_existing, verify_manifest, write_atomically
from incr_ds.target.deepspeed import ADAMW_DEFAULTS, NativeTarget, native_files
from incr_ds.target.files import TargetFile
from incr_ds.target.huggingface import SafetensorsFile, config_text, huggingface_files, index_text
from incr_ds.target.placement import check_layout

TAG = "grown"
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
    """What to grow into what: the source folder, the recipe and the output folder."""

    source: Path
    recipe: Path
    output: Path
    tag: str | None = None
    config: Path | None = None
    workers: int = 1
    trust: bool = False


@dataclass(frozen=True)
class PlannedGrowth:
    """An opened source, its plan, and every file that the target will have."""

    request: GrowthRequest
    source: LogicalCheckpoint
    plan: GrowthPlan
    files: tuple[TargetFile, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data that will be written."""
        return sum(file.num_bytes for file in self.files)


def plan_request(request: GrowthRequest) -> PlannedGrowth:
    """Open the source and plan everything; nothing is written. Raises IncrError for whatever cannot be done."""
    recipe = load_settings(request.recipe, GrowthRecipe)
    source = open_source(request.source, request.tag, request.config, trust=request.trust)
    return plan_files(request, source, recipe)


def plan_files(request: GrowthRequest, source: LogicalCheckpoint, recipe: GrowthRecipe) -> PlannedGrowth:
    """Plan the growth of an opened source, and the files of the layout that the recipe asks for."""
    plan = plan_growth(source.architecture, recipe, str(request.recipe))
    layout = recipe.layout
    if layout.format == "huggingface":
        dtype = _dtype(layout.dtype, "float32")
        return PlannedGrowth(request, source, plan, huggingface_files(plan.target, dtype), dtype)
    check_layout(plan.target, layout)
    _check_moments(source, recipe)
    dtype = _dtype(layout.dtype, str(source.facts.metadata.get("dtype", "float32")))
    return PlannedGrowth(request, source, plan, native_files(_native_target(source, plan, dtype)), dtype)


def grow_checkpoint(planned: PlannedGrowth, progress: Progress | None = None) -> Mapping[str, Any]:
    """Write and publish the target; returns the manifest's facts. The output appears whole or not at all."""
    request = planned.request
    refuse_existing(request.output)
    _check_space(planned)
    _check_source(planned, progress)
    facts = _facts(planned)
    kind = f"{planned.plan.recipe.layout.format} checkpoint, grown"
    with publish(request.output, kind, facts) as folder:
        for parent in {(folder / file.path).parent for file in planned.files}:
            parent.mkdir(exist_ok=True)
        for done, _ in enumerate(_write_files(planned, folder)):
            if progress:
                progress("writing", done + 1, len(planned.files))
        _write_companions(planned, folder)
    return facts


def _write_files(planned: PlannedGrowth, folder: Path) -> Iterator[TargetFile]:
    if planned.request.workers == 1:
        grown = GrownTensors(planned.plan, planned.source)
        for file in planned.files:
            file.write(folder, grown.read)
            yield file
        return
    with ProcessPoolExecutor(
        planned.request.workers, get_context("spawn"), _open_in_worker, (planned.request, planned.plan)
    ) as pool:
        jobs = {pool.submit(_write_in_worker, file, folder): file for file in planned.files}
        for job in as_completed(jobs):
            job.result()
            yield jobs[job]


_worker_tensors: list[GrownTensors] = []


def _open_in_worker(request: GrowthRequest, plan: GrowthPlan) -> None:
    torch.set_num_threads(1)
    source = open_source(request.source, request.tag, request.config, trust=request.trust)
    _worker_tensors.append(GrownTensors(plan, source))


def _write_in_worker(file: TargetFile, folder: Path) -> None:
    file.write(folder, _worker_tensors[0].read)


def _native_target(source: LogicalCheckpoint, plan: GrowthPlan, dtype: torch.dtype) -> NativeTarget:
    metadata = source.facts.metadata
    step = 0 if plan.recipe.optimizer == "reset" else source.facts.step or 0
    saved = metadata.get("optimizer_groups") or ()
    groups = tuple(sorted(saved, key=lambda group: -float(group["weight_decay"]))) or (
        ADAMW_DEFAULTS,
        {**ADAMW_DEFAULTS, "weight_decay": 0.0},
    )
    return NativeTarget(plan.target, plan.recipe.layout, dtype, TAG, step, int(metadata.get("global_steps", 0)), groups)


def _check_moments(source: LogicalCheckpoint, recipe: GrowthRecipe) -> None:
    if recipe.optimizer != "reset" and "exp_avg" not in source.facts.states:
        raise GrowthError(
            f"{source.facts.path}: a {source.facts.kind} source has no Adam moments, and optimizer: {recipe.optimizer} needs "
            "them; set optimizer: reset in the recipe."
        )


def _check_space(planned: PlannedGrowth) -> None:
    parent = planned.request.output.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if planned.num_bytes > free:
        raise CheckpointError(
            f"{planned.request.output}: needs {planned.num_bytes:,} bytes, {free:,} are free on its disk; nothing was written."
        )
    if not os.access(parent, os.W_OK):
        raise CheckpointError(f"{parent}: not writable; name another output.")


def _check_source(planned: PlannedGrowth, progress: Progress | None) -> None:
    """Prove the source: its files against its manifest if it has one, and that its shards belong together."""
    if (planned.request.source / MANIFEST).is_file():
        verify_manifest(planned.request.source)
    total = len(planned.source.architecture.stored)
    for done, _ in enumerate(planned.source.self_check()):
        if progress:
            progress("checking the source", min(done + 1, total), total)


def _facts(planned: PlannedGrowth) -> dict[str, Any]:
    source, plan = planned.source, planned.plan
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "exact": plan.exact,
        "notes": list(plan.notes),
        "source": {
            "kind": source.facts.kind,
            "step": source.facts.step,
            "parameters": source.architecture.num_parameters,
            "files": {
                path.name: {"bytes": path.stat().st_size, "xxh3": hash_file(path)} for path in source.facts.files
            },
        },
        "target": {
            "parameters": plan.target.num_parameters,
            "dtype": str(planned.dtype).removeprefix("torch."),
            "tensor_bytes": planned.num_bytes,
        },
    }


def _write_companions(planned: PlannedGrowth, folder: Path) -> None:
    """Everything beside the tensors: config, index or latest, the plan, the recipe, the tokenizer."""
    write_atomically(folder / "config.json", config_text(planned.plan.target, planned.dtype))
    write_atomically(folder / "growth_plan.json", planned.plan.to_json())
    shutil.copyfile(planned.request.recipe, folder / "growth_recipe.yaml")
    shards = tuple(file for file in planned.files if isinstance(file, SafetensorsFile))
    if not shards:
        write_atomically(folder / "latest", TAG)
    elif (index := index_text(shards)) is not None:
        write_atomically(folder / "model.safetensors.index.json", index)
    for name in TOKENIZER_FILES:
        if (planned.request.source / name).is_file():
            shutil.copyfile(planned.request.source / name, folder / name)


def _dtype(asked: str, otherwise: str) -> torch.dtype:
    name = otherwise if asked == "auto" else asked
    found: torch.dtype = getattr(torch, name)
    return found
