"""How far a checkpoint was trained, as whoever trained it noted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incr_ds.config.json_file import LARGE, read_json
from incr_ds.errors import CheckpointError

_NOTED = ("global_steps", "global_samples", "skipped_steps", "ds_version")


def training_facts(model: Mapping[str, object], folder: Path) -> dict[str, Any]:
    """Steps, samples and DeepSpeed's version from a DeepSpeed model file, and tokens where known."""
    return {key: model[key] for key in _NOTED if key in model} | tokens_seen(model, folder)


def tokens_seen(model: Mapping[str, object], folder: Path) -> dict[str, int]:
    """{"tokens": count} from a DeepSpeed model file (``position`` of this package's trainer, ``tokens`` of
    Megatron-DeepSpeed) or the trainer_state.json of transformers' Trainer in ``folder``; {} where none says."""
    position = model.get("position")
    noted = [
        position.get("tokens") if isinstance(position, dict) else None,
        model.get("tokens"),
        _trainer_tokens(folder),
    ]
    known = [int(count) for count in noted if isinstance(count, int | float) and 0 < count < math.inf]
    return {"tokens": known[0]} if known else {}


def _trainer_tokens(folder: Path) -> Any:
    path = folder / "trainer_state.json"
    try:  # transformers writes NaN into its log
        return read_json(path, CheckpointError, most=LARGE, finite=False).get("num_input_tokens_seen")
    except CheckpointError:  # it decides nothing
        return None
