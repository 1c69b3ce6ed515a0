"""Reads how far a checkpoint was trained, as its trainer recorded it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.base import Counters
from incr_ds.config.json_file import LARGE, read_json
from incr_ds.errors import CheckpointError

_NOTED = ("global_steps", "global_samples", "skipped_steps", "ds_version")


def counters(model: Mapping[str, Any], folder: Path) -> Counters:
    """Read steps, samples, tokens and DeepSpeed's version from a DeepSpeed model file and the checkpoint's ``folder``."""
    return Counters(tokens=_tokens_seen(model, folder), **{key: model.get(key) for key in _NOTED})


def _tokens_seen(model: Mapping[str, Any], folder: Path) -> int | None:
    """Tokens seen in training, or None if nothing records them.

    A DeepSpeed model file may (``position`` of this package's trainer, ``tokens`` of Megatron-DeepSpeed), or
    trainer_state.json of transformers' Trainer in ``folder``.
    """
    position = model.get("position")
    noted = [
        position.get("tokens") if isinstance(position, dict) else None,
        model.get("tokens"),
        _trainer_tokens(folder),
    ]
    known = [int(count) for count in noted if isinstance(count, int | float) and 0 < count < math.inf]
    return known[0] if known else None


def _trainer_tokens(folder: Path) -> Any:
    path = folder / "trainer_state.json"
    try:  # transformers writes NaN into its log
        return read_json(path, CheckpointError, most=LARGE, finite=False).get("num_input_tokens_seen")
    except CheckpointError:  # the count is only informative
        return None
