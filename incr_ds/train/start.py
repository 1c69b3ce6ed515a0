"""How a run starts: the model's architecture, its initial weights, and the sources to open for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import Architecture, architecture_from_config, read_config
from incr_ds.arch.freezing import frozen_tensors
from incr_ds.arch.multipliers import Multipliers, marks_only, read_multipliers, without_marks
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.integrity import open_described
from incr_ds.checkpoint.publish import MANIFEST, read_manifest
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.training import GrowthStart, RunSettings
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.launch.balance import placed
from incr_ds.launch.stages import check_recipe_layout
from incr_ds.offline.growth_on_load import GrownCheckpoint, open_grown
from incr_ds.offline.process_group import agree
from incr_ds.sharding.optimizer_groups import set_apart
from incr_ds.sharding.placement import check_layout, even_stages
from incr_ds.train.ranks import all_ranks, on_every_rank, on_rank_zero
from incr_ds.train.resuming import check_layout_matches

# The dtype of the weights that a run in each precision saves.
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a run starts, in one of three ways.

    Either ``weights`` is a source whose weights are copied (with ``with_moments``, also its moments and step). Or
    ``checkpoint`` and ``tag`` name a DeepSpeed folder in the run's own layout, loaded with its optimizer state. Without
    both, the model is fresh. ``multipliers`` are learning-rate multipliers per tensor. ``description`` is one line for the
    user.
    """

    architecture: Architecture
    description: str
    weights: LogicalCheckpoint | None = None
    with_moments: bool = False
    checkpoint: Path | None = None
    tag: str | None = None
    multipliers: Mapping[str, Multipliers] = field(default_factory=dict)


def find_start(run: RunSettings) -> Start:
    """Decide from ``run.model`` how ``run`` starts.

    A DeepSpeed checkpoint that this package published keeps its optimizer state (unless ``load_optimizer`` is false) and
    must have the run's layout unless ``run.resume.reshard`` is set. A source that is grown on load keeps it in any layout.
    All other checkpoints give only their weights, and the optimizer starts fresh. Raises LayoutError if a layout differs, a
    recipe's own included, and CheckpointError for a DeepSpeed folder without a manifest if ``load_optimizer`` is true.
    """
    model = run.model
    if model.initialize_from is None:
        path = Path(str(model.config))
        architecture = architecture_from_config(read_config(path), str(path))
        return Start(architecture=architecture, description=f"fresh weights of {path}, seed {run.seed}")
    if isinstance(model.initialize_from, GrowthStart):
        return _grown_on_load(run, model.initialize_from)
    folder = Path(model.initialize_from)
    source = open_described(folder, tag=model.tag)
    if model.load_optimizer and (folder / "latest").is_file():
        return _with_optimizer(run, folder, source)
    description = f"weights of {folder} ({source.facts.kind}); the optimizer starts fresh"
    multipliers = _followed(run, read_multipliers(folder))
    return Start(architecture=source.architecture, weights=source, description=description, multipliers=multipliers)


def find_resharding(run: RunSettings, folder: Path) -> Start | None:
    """How ``run`` continues from its own checkpoint ``folder`` in another layout, or None if the layout is the same.

    All ranks must call this. They open the checkpoint before any builds an engine, so that a failure of one reaches all.
    """
    found = ParallelLayout.model_validate(on_rank_zero(lambda: read_manifest(folder)["facts"]["layout"]))
    if found == run.layout:
        return None
    source = agree(all_ranks(), lambda: open_described(folder))
    return Start(
        architecture=source.architecture,
        weights=source,
        with_moments=True,
        description=_resharded(source, found, run.layout),
        multipliers=read_multipliers(folder),
    )


def _resharded(source: LogicalCheckpoint, found: ParallelLayout, layout: ParallelLayout) -> str:
    """What resharding does, and what it cannot keep."""
    config = source.architecture.config
    dropouts = sorted(field for field in source.architecture.family.effective_fields if "drop" in field)
    random = [f"{field} {config[field]}" for field in dropouts if config.get(field)]
    noise = f" ({', '.join(random)}: each layout drops other elements)" if random else ""
    return f"resharded from {found} to {layout}{noise}"


def check_growth(start: Start) -> None:
    """Raise CheckpointError on all ranks if a growth on load would copy NaN or infinity. All ranks must call this.

    Each rank checks a part of the source before any rank builds an engine, where a failure would leave the others waiting.
    """
    grown = start.weights
    if isinstance(grown, GrownCheckpoint):
        ranks = all_ranks()
        on_every_rank(
            lambda: grown.check_finite(with_moments=start.with_moments, share=ranks.rank, shares=ranks.size),
            "growth on load: refused",
            "No step was taken with it.",
        )


def _grown_on_load(run: RunSettings, growth: GrowthStart) -> Start:
    grown, recipe = open_grown(Path(growth.source), Path(growth.recipe), run.model.tag)
    check_recipe_layout(recipe, growth.recipe, run.layout)
    check_layout(grown.architecture, run.layout)
    if run.model.load_optimizer:
        _check_same_optimizer(run, grown, f"optimizer: reset in {growth.recipe}")
    kept = "weights and optimizer state" if run.model.load_optimizer and recipe.optimizer != "reset" else "weights"
    description = f"{kept} of {growth.source} ({grown.facts.kind} by {growth.recipe})"
    return Start(
        architecture=grown.architecture,
        weights=grown,
        with_moments=run.model.load_optimizer,
        description=description,
        multipliers=_followed(run, grown.multipliers),
    )


def _followed(run: RunSettings, declared: Mapping[str, Multipliers]) -> Mapping[str, Multipliers]:
    """The multipliers that a run keeps of those that its checkpoint declares. Which tensors are new it always keeps."""
    return declared if run.optimizer.multipliers == "checkpoint" else marks_only(declared)


def _with_optimizer(run: RunSettings, folder: Path, source: LogicalCheckpoint) -> Start:
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            f"{folder}: incr_ds did not write this DeepSpeed checkpoint; its optimizer state cannot be used as "
            "it is. Grow or convert it (tools/grow_checkpoint.py), or set model.load_optimizer: false for its weights."
        )
    run = placed(run, source.architecture)
    found = _found_layout(folder, source)
    if not run.resume.reshard:
        check_layout_matches(folder, found, run.layout)
    reshards = found != run.layout.model_dump()
    tag = run.model.tag or (folder / "latest").read_text(encoding="utf-8").strip()
    kept = "weights and optimizer state" if "exp_avg" in source.facts.states else "weights"
    description = f"{kept} of {folder} ({source.facts.kind}, {tag})"
    if reshards:
        description += f", {_resharded(source, ParallelLayout.model_validate(found), run.layout)}"
    declared = read_multipliers(folder)
    multipliers = _followed(run, declared)
    _check_same_optimizer(run, source, "model.load_optimizer: false")
    if (
        reshards
        or _has_own_groups(run, folder, declared)
        or multipliers != declared
        or _changes_frozen(run, folder, source)
        or source.facts.dtype != PRECISIONS[run.precision]
        or (run.optimizer.name == "muon" and not source.facts.momentum)
    ):
        # A grown folder's flat buffers have two groups with all tensors; a run's have groups of its own. Filling tensor by
        # tensor works for both. It also works for masters, which are fp32 at any precision of the model.
        return Start(
            architecture=source.architecture,
            weights=source,
            with_moments=True,
            description=description,
            multipliers=multipliers,
        )
    return Start(
        architecture=source.architecture, checkpoint=folder, tag=tag, description=description, multipliers=multipliers
    )


def _found_layout(folder: Path, source: LogicalCheckpoint) -> dict[str, Any]:
    """A checkpoint's layout by its files. The stages are those that its run noted, or that its files show."""
    noted, shown = read_manifest(folder)["facts"].get("layout", {}).get("stages"), source.facts.stages
    is_even = not shown or shown == even_stages(source.architecture.num_layers, len(shown))
    stages = noted or ("even" if is_even else shown)
    return {**source.facts.layout, "stages": tuple(stages) if isinstance(stages, list) else stages}


def _check_same_optimizer(run: RunSettings, source: LogicalCheckpoint, anew: str) -> None:
    """Raise ConfigError if ``source`` has the state of another optimizer. ``anew`` is what starts the optimizer anew."""
    facts, name = source.facts, run.optimizer.name
    if len(facts.states) == 1:
        return
    others = (facts.momentum ^ set_apart(name, source.architecture)) - set(facts.frozen)
    if not others:
        return
    before = "muon" if facts.momentum else "adamw"
    if before == name:
        raise ConfigError(
            f"optimizer.name: {name} trains the matrices of decoder layers by Muon, but in {facts.path} it trained other "
            f"tensors, unlike {min(others)}; set {anew}, which starts the optimizer anew."
        )
    raise ConfigError(
        f"optimizer.name: {name}, but {facts.path} has the optimizer state of {before}; set name: {before}, or {anew}, which "
        "starts the optimizer anew."
    )


def _has_own_groups(run: RunSettings, folder: Path, declared: Mapping[str, Multipliers]) -> bool:
    """Whether the run's parameter groups, or those in the folder, can be others than the two of every folder."""
    settings = read_manifest(folder)["facts"].get("settings", {}).get("optimizer", {})
    apart = run.optimizer.new_parameters is not None or settings.get("new_parameters") is not None
    return bool(declared if apart else without_marks(declared))


def _changes_frozen(run: RunSettings, folder: Path, source: LogicalCheckpoint) -> bool:
    """Whether the run freezes more than the checkpoint's run did. Raises ConfigError if it trains what has no moments."""
    before = set(source.facts.frozen)
    now = frozen_tensors(source.architecture, run.model.freeze)
    thawed = sorted(before - now)
    if thawed:
        raise ConfigError(
            f"model.freeze: {thawed[0]} and {len(thawed) - 1} other tensors that this run trains were frozen in {folder}, so "
            "they have no moments; freeze them here too, or set model.load_optimizer: false, which starts all moments anew."
        )
    return before != now
