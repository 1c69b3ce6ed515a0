"""Real checkpoints of DeepSpeed's AutoTP. At learning rate 0 the right weights are those that the model started from."""

import os
from pathlib import Path

import torch
from zero_engines import _code_moments

from incr_ds.checkpoint.huggingface.writer import config_text
from incr_ds.checkpoint.publish import write_atomically
from incr_ds.testing.memory import drawn_model, small_architecture


def write_autotp(folder, cases):
    """Write every case on two tensor ranks."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for name, case in cases.items():
        _write_case(Path(folder) / name, case)


def case_model(case):
    return drawn_model(small_architecture(case["family"], **case["config"]), torch.float32)


def _write_case(folder, case):
    import deepspeed

    model = case_model(case)
    architecture = small_architecture(case["family"], **case["config"])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case["stage"]},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.get("bf16", False)},
        "tensor_parallel": {"autotp_size": 2},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    tokens = torch.arange(12).unsqueeze(0)
    for _ in range(2):
        logits = engine(tokens, use_cache=False).logits
        engine.backward(logits.float().square().mean())
        engine.step()
    _code_moments(engine.optimizer)
    engine.save_checkpoint(str(folder), tag="step")
    if os.environ["RANK"] == "0":
        write_atomically(folder / "config.json", config_text(architecture, torch.float32))
    engine.destroy()
