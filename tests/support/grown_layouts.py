"""Child processes of test_grown_layouts: DeepSpeed's own loading of a grown checkpoint into the run's engine."""

import os
from pathlib import Path

import torch

from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.train.engine import build_engine


def settings(layout, precision, folder):
    return parse_settings(
        {
            "output": str(folder),
            "precision": precision,
            "model": {"initialize_from": str(folder)},
            "layout": layout,
            "batch": {"sequence_length": 12, "micro_batch_size": 1, "global_batch_size": layout["data_parallel"]},
            "schedule": {"train_steps": 5, "learning_rate": 1e-3},
            "data": {"train": [{"prefix": "unused"}]},
            "checkpoint": {"interval": 5},
        },
        RunSettings,
        "test",
    )


def load_evaluate_save(folder, layout, precision, tokens, by="DeepSpeed"):
    """Load ``folder`` into an engine that started from other weights, by DeepSpeed or tensor by tensor ("us"); returns (loss on
    tokens, loss after a step)."""
    checkpoint = open_source(Path(folder))
    weights = checkpoint if by == "us" else None
    engine = build_engine(settings(layout, precision, folder), checkpoint.architecture, weights, None)
    if by == "us":
        engine.fill_optimizer(checkpoint)
    else:
        engine.load(Path(folder), "grown")
    batch = (tokens[:, :-1], tokens[:, 1:])
    loss = engine.evaluate(iter([batch]), 1).ce
    engine.save(Path(folder) / "again", "loaded", {})
    engine.train_step(iter([batch]), learning_rate=1e-3)
    after = engine.evaluate(iter([batch]), 1).ce
    if os.environ["RANK"] == "0":
        config = (Path(folder) / "config.json").read_text()
        (Path(folder) / "again" / "config.json").write_text(config)
    engine.close()
    return loss, after


def masters_after_start(folder, layout, exported):
    """Start a bf16 run from the fp32 Hugging Face folder ``exported`` and save; the masters must be its weights."""
    weights = open_source(Path(exported))
    engine = build_engine(settings(layout, "bf16", folder), weights.architecture, weights, None)
    batch = torch.zeros(1, 12, dtype=torch.long)
    engine.train_step(iter([(batch, batch)]), learning_rate=0.0)
    engine.save(Path(folder) / "started", "after", {})
    if os.environ["RANK"] == "0":
        config = (Path(exported) / "config.json").read_text()
        (Path(folder) / "started" / "config.json").write_text(config)
    engine.close()
