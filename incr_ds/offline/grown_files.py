"""Writes the files beside the tensors of a grown checkpoint: config, plan, recipe, multipliers, advice, tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from incr_ds.arch.multipliers import FILE as MULTIPLIERS_FILE
from incr_ds.arch.multipliers import multipliers_text, without_multipliers
from incr_ds.checkpoint.base import CheckpointFacts
from incr_ds.checkpoint.companions import copy_companions
from incr_ds.checkpoint.huggingface.writer import (
    SafetensorsFile,
    config_text,
    index_text,
    published_config_text,
)
from incr_ds.checkpoint.publish import (
    MANIFEST,
    read_manifest,
    write_atomically,
)
from incr_ds.growth.advice import FILE as ADVICE_FILE
from incr_ds.growth.advice import Trained, advice_text, advise
from incr_ds.offline.plan import TAG, PlannedGrowth


def write_companions(planned: PlannedGrowth, folder: Path, ratio: float | None) -> None:
    """Write everything beside the tensors: config, index or latest, the plan, the recipe, advice for training, the tokenizer."""
    shards = tuple(file for file in planned.files if isinstance(file, SafetensorsFile))
    config = (published_config_text if shards else config_text)(planned.plan.target, planned.dtype)
    write_atomically(folder / "config.json", config)
    write_atomically(folder / "growth_plan.json", planned.plan.to_json())
    shutil.copyfile(planned.request.recipe, folder / "growth_recipe.yaml")
    if planned.multipliers:
        write_atomically(folder / MULTIPLIERS_FILE, multipliers_text(planned.multipliers))
    if planned.plan.target.family.training_supported:
        training = source_training(planned.request.source, planned.source.facts)
        if advice := advice_text(advise(planned.plan, training, ratio)):
            write_atomically(folder / ADVICE_FILE, advice)
    if not shards:
        universal = planned.plan.recipe.layout.format == "universal"
        write_atomically(folder / ("latest_universal" if universal else "latest"), TAG)
    elif (index := index_text(shards)) is not None:
        write_atomically(folder / "model.safetensors.index.json", index)
    copy_companions(planned.request.source, folder)


def source_training(folder: Path, facts: CheckpointFacts) -> Trained:
    """What a source's checkpoint, and its manifest if it has one, state about its training."""
    known = read_manifest(folder)["facts"] if (folder / MANIFEST).is_file() else {}
    groups = [without_multipliers(group) for group in facts.optimizer_groups]
    return Trained(known.get("settings", {}), groups if facts.step else (), bool(facts.frozen))
