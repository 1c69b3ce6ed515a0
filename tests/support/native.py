"""Child processes of test_grow: a real source, and DeepSpeed's own loading of what was grown from it."""

import os
from pathlib import Path

import torch

from incr_ds.testing.memory import drawn_model, small_architecture


def _engine(architecture, stage, seed):
    import deepspeed

    model = drawn_model(architecture, torch.float32, seed=seed)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-3), config=config)[0]


def _start():
    """Join the process group; returns this process's rank."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    return int(os.environ["RANK"])


def write_source(folder):
    from incr_ds.checkpoint.huggingface.writer import config_text
    from incr_ds.checkpoint.publish import write_atomically

    rank = _start()
    architecture = small_architecture("llama", tie_word_embeddings=True)
    engine = _engine(architecture, 1, seed=0)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        tokens = torch.randint(101, (1, 12), generator=generator)
        engine.backward(engine(tokens, labels=tokens, use_cache=False).loss)
        engine.step()
    engine.save_checkpoint(str(Path(folder) / "zero"))
    if rank == 0:
        write_atomically(Path(folder) / "zero" / "config.json", config_text(architecture, torch.bfloat16))
        drawn_model(architecture, torch.float32, seed=5).save_pretrained(Path(folder) / "huggingface")


def check_loads_in_deepspeed(folders):
    """Load each grown checkpoint into an engine that started from other weights; returns what it then computes."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from incr_ds.checkpoint.opening import open_source
    from incr_ds.offline.compare import random_batches

    rank = _start()
    found = {}
    for stage, folder in folders.items():
        engine = _engine(open_source(Path(folder)).architecture, stage, seed=77)
        path, _ = engine.load_checkpoint(folder)
        assert path is not None
        tokens = random_batches(101, 1, 12)[0]
        loss = engine(tokens, labels=tokens, use_cache=False).loss
        before = engine.module.lm_head.weight.detach().clone()
        engine.backward(loss)
        engine.step()
        found[stage] = {
            "loss": float(loss),
            "moves": bool((engine.module.lm_head.weight != before).any()),
        }
        if rank == 0:
            torch.save(get_fp32_state_dict_from_zero_checkpoint(folder), Path(folder) / "zero_to_fp32.pt")
    return found
