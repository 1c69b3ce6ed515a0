"""Run settings for pico models."""

from __future__ import annotations

from typing import Any

from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings


def pico_run(**sections: Any) -> RunSettings:
    """A valid fp32 run of 2 micro-batches of 2 samples; ``sections`` replace those of the run file."""
    run = {
        "output": "runs/pico",
        "precision": "fp32",
        "model": {"config": "pico"},
        "batch": {"sequence_length": 12, "micro_batch_size": 2, "global_batch_size": 4},
        "schedule": {"train_steps": 4, "learning_rate": 0.05},
        "data": {"train": [{"prefix": "pico"}]},
        "checkpoint": {"interval": 2},
    }
    return parse_settings(run | sections, RunSettings, "pico run")
