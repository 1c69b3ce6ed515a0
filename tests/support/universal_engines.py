"""Child processes of test_universal: real engines, every parameter NaN, that DeepSpeed fills from a universal folder."""

import json
import os
from pathlib import Path

import torch

from incr_ds.checkpoint.opening import open_source
from incr_ds.testing.memory import drawn_model


def config_of(case):
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case["stage"], **case.get("zero", {})},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case["bf16"]},
        "checkpoint": {"load_universal": not case.get("native", False)},
    }
    if case.get("bf16_optimizer"):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def load_in_plain_engines(folder, cases):
    """For each case load ``folder`` (or the case's own) and save natively below ``folder``-CASE; returns the hyperparameters
    then in force."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    return {name: _load_in_plain_engine(case.get("folder", folder), name, case) for name, case in cases.items()}


def _load_in_plain_engine(folder, name, case):
    import deepspeed

    model = drawn_model(open_source(Path(folder)).architecture, torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.8, 0.95))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config_of(case))
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    kept = [(g["lr"], g["betas"], g["weight_decay"]) for g in engine.optimizer.param_groups if g["params"] is not None]
    tokens = torch.arange(12).unsqueeze(0)
    loss = float(engine(tokens, labels=tokens, use_cache=False).loss.detach())
    _save(engine, Path(folder), name)
    steps = engine.global_steps
    engine.destroy()
    return {"groups": kept, "loss": loss, "global_steps": steps, "native": case.get("native", False)}


def load_in_layout(folder, layout, name):
    """The same through the run's own engine: tensor and pipeline ranks."""
    from grown_layouts import settings

    from incr_ds.train.engine import build_engine

    run = settings(layout, "fp32", folder)
    (Path(folder) / "universal.json").write_text(json.dumps({"checkpoint": {"load_universal": True}}))
    run = run.model_copy(update={"deepspeed": str(Path(folder) / "universal.json")})
    engine = build_engine(run, open_source(Path(folder)).architecture, None, None)
    for parameter in engine.module.parameters():
        parameter.data.fill_(float("nan"))
    path, _ = engine._engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
    assert path is not None
    _save(engine._engine, Path(folder), name)
    engine.close()


def _save(engine, folder, name):
    target = folder.with_name(f"{folder.name}-{name}")
    engine.save_checkpoint(str(target), tag="again")
    if os.environ["RANK"] == "0":
        (target / "config.json").write_text((folder / "config.json").read_text())
