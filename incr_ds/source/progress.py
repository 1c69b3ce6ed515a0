"""How far a checkpoint was trained, as whoever trained it noted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    known = [int(count) for count in noted if isinstance(count, int | float) and count > 0]
    return {"tokens": known[0]} if known else {}


def _trainer_tokens(folder: Path) -> Any:
    path = folder / "trainer_state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it decides nothing
        return None
    return content.get("num_input_tokens_seen") if isinstance(content, dict) else None
