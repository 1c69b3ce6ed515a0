"""Real ZeRO checkpoints of transformers models, with a truth that no knowledge of ZeRO's layout enters.

After training, the flat moment buffers are overwritten element by element as functions of the flat masters (exp_avg =
2 * master, exp_avg_sq = master^2), so a reader that finds the right weights finds the right moments, exactly. The right
weights are the live parameters of the module.
"""

import os
from pathlib import Path

import torch

from incr_ds.checkpoint.huggingface.writer import config_text
from incr_ds.checkpoint.publish import write_atomically
from incr_ds.testing.memory import drawn_model, small_architecture


def write_cases(folder, cases):
    """Write every case in one process group; rank 0 leaves {parameter: live weight} in live.pt of each case's folder."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    for name, case in cases.items():
        _write_case(int(os.environ["RANK"]), Path(folder) / name, case)


def _write_case(rank, folder, case):
    import deepspeed

    architecture = small_architecture(case.get("family", "llama"), tie_word_embeddings=case["tied"])
    model = drawn_model(architecture, torch.float32)
    for parameter in case.get("frozen", ()):
        model.get_parameter(parameter).requires_grad_(False)
    if case.get("buffer"):
        model.model.register_buffer("seen_tokens", torch.arange(7))
    trained = [p for p in model.parameters() if p.requires_grad]
    dtype = torch.bfloat16 if case["bf16"] else torch.float32
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": case["stage"], **case["zero"]},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case["bf16"]},
    }
    if case.get("bf16_optimizer"):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        tokens = torch.randint(101, (1, 12), generator=generator)
        engine.backward(engine(tokens, labels=tokens, use_cache=False).loss)
        engine.step()
    _code_moments(engine.optimizer)
    engine.save_checkpoint(str(folder), tag="step")
    if rank == 0:
        write_atomically(folder / "config.json", config_text(architecture, dtype))
    live = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=case["stage"] == 3):
            live[name] = parameter.data.clone()
    if rank == 0:
        torch.save(live, folder / "live.pt")
    engine.destroy()


def _code_moments(optimizer):
    if hasattr(optimizer, "fp32_groups"):  # ZeRO-0 in bf16: masters one by one
        return _code(optimizer.optimizer, [master for group in optimizer.fp32_groups for master in group])
    if isinstance(optimizer, torch.optim.Optimizer):  # ZeRO-0 in fp32: the parameters are the masters
        return _code(optimizer, [parameter for group in optimizer.param_groups for parameter in group["params"]])
    kinds = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    flat = next(getattr(optimizer, kind) for kind in kinds if hasattr(optimizer, kind))
    return _code(optimizer.optimizer, flat)


def _code(optimizer, masters):
    for master in masters:
        state = optimizer.state[master]
        assert state["exp_avg_sq"].count_nonzero() > 0  # it did train
        state["exp_avg"].copy_(2 * master.detach())
        state["exp_avg_sq"].copy_(master.detach() ** 2)
