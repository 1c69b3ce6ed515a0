"""Writes the files beside the tensors of a grown checkpoint: config, plan, recipe, multipliers, advice, tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from incr_ds.arch.multipliers import without_multipliers
from incr_ds.checkpoint.base import CheckpointFacts
from incr_ds.checkpoint.companions import Companions
from incr_ds.checkpoint.huggingface.writer import (
    SafetensorsFile,
    config_text,
    index_text,
    published_config_text,
)
from incr_ds.checkpoint.megatron_core.folders import LATEST
from incr_ds.checkpoint.megatron_core.torch_writer import RankStateFile
from incr_ds.checkpoint.megatron_core.writer import CommonFile
from incr_ds.checkpoint.publish import (
    MANIFEST,
    read_manifest,
)
from incr_ds.config.growth import OF_MEGATRON_CORE
from incr_ds.growth.advice import FILE as ADVICE_FILE
from incr_ds.growth.advice import Trained, advice_text, advise
from incr_ds.offline.plan import TAG, PlannedGrowth


def write_companions(planned: PlannedGrowth, folder: Path, ratio: float | None) -> None:
    """Write everything beside the tensors: config, index or latest, the plan, the recipe, advice for training, the tokenizer."""
    shards = tuple(file for file in planned.files if isinstance(file, SafetensorsFile))
    plan, layout = planned.plan, planned.plan.recipe.layout
    texts = {"growth_plan.json": plan.to_json()}
    if plan.target.family.training_supported:
        training = source_training(planned.request.source, planned.source.facts)
        if advice := advice_text(advise(plan, training, ratio)):
            texts[ADVICE_FILE] = advice
    if layout.format in OF_MEGATRON_CORE:
        texts[LATEST] = next(file.target.tag for file in planned.files if isinstance(file, CommonFile | RankStateFile))
    elif not shards:
        texts["latest_universal" if layout.format == "universal" else "latest"] = TAG
    elif (index := index_text(shards)) is not None:
        texts["model.safetensors.index.json"] = index
    config = (published_config_text if shards else config_text)(plan.target, planned.dtype)
    Companions(config, planned.request.source, planned.multipliers, texts).write(folder)
    shutil.copyfile(planned.request.recipe, folder / "growth_recipe.yaml")


def source_training(folder: Path, facts: CheckpointFacts) -> Trained:
    """What a source's checkpoint, and its manifest if it has one, state about its training."""
    known = read_manifest(folder)["facts"] if (folder / MANIFEST).is_file() else {}
    groups = [without_multipliers(group) for group in facts.optimizer_groups if not group.get("use_muon")]
    return Trained(known.get("settings", {}), groups if facts.step else (), bool(facts.frozen))
