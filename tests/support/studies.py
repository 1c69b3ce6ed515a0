"""A study of two tiny models, and results written by hand in place of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from incr_ds.config.fields import parse_settings
from incr_ds.config.study import StudySettings

# A model of 4 layers and one of 2. Parameters: 32 x 8 + layers x (4 x 8 x 8 + 3 x 8 x 16 + 2 x 8) + 8.
WIDTH = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
TARGET = 32 * 8 + 4 * (4 * 64 + 3 * 128 + 16) + 8


def tiny_study(folder: Path, **changes: Any) -> StudySettings:
    """Scratch, a source with two learning rates, and the source's layers stacked. ``changes`` are further arms."""
    for layers in (2, 4):
        (folder / f"{layers}.json").write_text(json.dumps({**WIDTH, "num_hidden_layers": layers}))
    content = {
        "output": str(folder / "out"),
        "target": "large",
        "models": {"large": str(folder / "4.json"), "small": str(folder / "2.json")},
        "seeds": [0, 1],
        "tokens_per_parameter": [10, 20],
        "held_out": {"code": "data/code"},
        "common": {
            "precision": "fp32",
            "batch": {"sequence_length": 16, "micro_batch_size": 2, "global_batch_size": 4},
            "data": {"train": [{"prefix": "data/train"}]},
            "checkpoint": {"interval": 50},
        },
        "arms": {
            "scratch": {"model": "large", "purpose": "0", "learning_rates": [0.01]},
            "source": {"model": "small", "purpose": "S", "learning_rates": [0.01, 0.02]},
            "stack": {
                "model": "large",
                "purpose": "A1",
                "learning_rates": [0.01],
                "growth": {"source": "source", "at": 0.5, "recipe": {"depth": {"method": "stack", "new": "copy"}}},
                "branches": [0.8, 1.0],
                "warmup_steps": 5,
            },
            **changes,
        },
    }
    return parse_settings(content, StudySettings, "study.yaml")
