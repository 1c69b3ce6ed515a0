"""Child processes of test_grow_on_load: a run's engine, filled from a source and a recipe."""

import os
from pathlib import Path

import torch

from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import CheckpointError
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.engine import build_engine
from incr_ds.train.start import check_growth, find_start


def run_settings(folder, layout, precision, optimizer="adamw", **model):
    growth = {"source": str(Path(folder) / "source"), "recipe": str(Path(folder) / "recipe.yaml")}
    return parse_settings(
        {
            "output": str(folder),
            "precision": precision,
            "model": {"initialize_from": growth, **model},
            "layout": layout,
            "optimizer": {"name": optimizer, "gradient_clipping": float(optimizer == "adamw")},
            "batch": {
                "sequence_length": 12,
                "micro_batch_size": 1,
                "global_batch_size": layout.get("data_parallel", 1),
            },
            "schedule": {"train_steps": 5, "learning_rate": 1e-3},
            "data": {"train": [{"prefix": "unused"}]},
            "checkpoint": {"interval": 5},
        },
        RunSettings,
        "test",
    )


def refuse_or_start(folder, layout):
    """What a rank says about the numbers of the source before it builds its engine; with moments, and without."""
    initialize_distributed(run_settings(folder, layout, "fp32").layout)
    said = []
    for load_optimizer in (True, False):
        start = find_start(run_settings(folder, layout, "fp32", load_optimizer=load_optimizer))
        try:
            check_growth(start)
            said.append(None)
        except CheckpointError as error:
            said.append(str(error))
    return said


def grow_and_save(folder, layout, precision, optimizer):
    """Fill an engine from the source and the recipe, save it natively, and take a step that must move the weights."""
    settings = run_settings(folder, layout, precision, optimizer)
    start = find_start(settings)
    engine = build_engine(settings, start.architecture, start.weights, None)
    assert start.with_moments and settings.model.load_optimizer
    engine.fill_optimizer(start.weights)
    engine.save(Path(folder) / "loaded", "after", {})
    if os.environ["RANK"] == "0":
        (Path(folder) / "loaded" / "config.json").write_text((Path(folder) / "target" / "config.json").read_text())
    tokens = torch.arange(13).unsqueeze(0)
    found = engine.train_step(iter([(tokens[:, :-1], tokens[:, 1:])]), learning_rate=1e-3)
    engine.save(Path(folder) / "stepped", "after", {})
    engine.close()
    return found.loss
