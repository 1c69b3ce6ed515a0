"""Checkpoints in Megatron-LM's format torch, cut from whole tensors by the definition of the format, without ranks."""

import enum
import math

import megatron_format
import torch
from torch_dist_folders import STATES, arguments_of

ITERATION = 7
NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",  # as Transformer Engine's modules call it
    "self_attention.query_key_value.weight": "self_attention.linear_qkv.weight",
    "self_attention.dense.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",  # as local modules call it
    "mlp.dense_h_to_4h.weight": "mlp.linear_fc1.weight",
    "mlp.dense_4h_to_h.weight": "mlp.linear_fc2.weight",
}


class Backend(enum.Enum):
    """An enumeration in the arguments, as Megatron-LM has several."""

    FLASH = 1


def parameters_of(source, state, degrees, rank, stage):
    """The parameters of a rank's GPTModel, in the order of its modules."""
    tensors = {spec.name: source.read(spec.name, state) for spec in source.architecture.stored}
    sizes, (ranks, stages) = source.architecture.sizes, degrees
    first, stop = (math.ceil(sizes["layers"] / stages * edge) for edge in (stage, stage + 1))
    embedding = megatron_format.padded(tensors["model.embed_tokens.weight"], ranks, rank, 9.0)
    found = {"embedding.word_embeddings.weight": embedding} if stage == 0 else {}
    for number, layer in enumerate(range(first, stop)):
        held = megatron_format.fused(tensors, f"model.layers.{layer}.", sizes["kv_heads"], ranks, rank)
        found |= {f"decoder.layers.{number}.{NAMES[name]}": tensor for name, tensor in held.items()}
    if stage == stages - 1:
        found["decoder.final_layernorm.weight"] = tensors["model.norm.weight"]
        if not source.architecture.tied:
            found["output_layer.weight"] = megatron_format.padded(tensors["lm_head.weight"], ranks, rank, 9.0)
        elif stages > 1:
            found["output_layer.weight"] = embedding
    return {name: tensor.contiguous() for name, tensor in found.items()}


def write_ranks(folder, source, degrees=(2, 2), optimizer="mixed", change=lambda content, buffers: None, **further):
    """``optimizer``: full (fp32), mixed (bf16 with masters), distributed or None. ``change`` may change each rank's content."""
    (folder / "latest_checkpointed_iteration.txt").write_text(f"{ITERATION}\n")
    given = arguments_of(source.architecture, attention_backend=Backend.FLASH, **further)
    for stage in range(degrees[1]):
        for rank in range(degrees[0]):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if degrees[1] > 1 else "")
            inner = folder / f"iter_{ITERATION:07d}" / name
            inner.mkdir(parents=True)
            held = {state: parameters_of(source, state, degrees, rank, stage) for state in STATES}
            weights = held["weight"]
            content = {
                "args": given,
                "checkpoint_version": 3.0,
                "iteration": ITERATION,
                "model": weights if optimizer == "full" else {key: value.bfloat16() for key, value in weights.items()},
                "rng_state": [{"torch_rng_state": torch.get_rng_state()}],
            }
            content["model"] = {**content["model"], "decoder.layers.0.mlp.linear_fc1._extra_state": None}
            buffers = _buffers(held) if optimizer == "distributed" else None
            if optimizer is not None:
                content["optimizer"] = _optimizer(held, optimizer, source.facts.step)
            change(content, buffers)
            torch.save(content, inner / "model_optim_rng.pt")
            if buffers is not None:
                torch.save(buffers, inner / "distrib_optim.pt")
    return folder / f"iter_{ITERATION:07d}"


def _optimizer(held, optimizer, step):
    groups = [[name for name, tensor in held["weight"].items() if (tensor.dim() > 1) == m] for m in (True, False)]
    numbers = {name: number for number, name in enumerate(name for group in groups for name in group)}
    named = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.1, "betas": (0.9, 0.95), "step": step}
    described = [
        {**named, "wd_mult": float(not number), "params": [numbers[name] for name in group]}
        for number, group in enumerate(groups)
    ]
    if optimizer == "distributed":
        return {"optimizer": {"param_groups": [{k: v for k, v in g.items() if k != "params"} for g in described]}}
    states = {
        n: {s: held[s][name] for s in STATES[1:]} | {"step": torch.tensor(float(step))} for name, n in numbers.items()
    }
    if optimizer == "full":
        return {"state": states, "param_groups": described}
    masters = [[held["weight"][name] for name in group] for group in groups]
    return {"optimizer": {"state": states, "param_groups": described}, "fp32_from_fp16_params": masters}


def _buffers(held):
    """The last parameter first, each from a multiple of 64 on."""

    def joined(tensors):
        found = torch.zeros(0)
        for tensor in reversed(list(tensors.values())):
            found = torch.cat([found, torch.full((-len(found) % 64,), 7.0), tensor.reshape(-1)])
        return found

    names = dict(zip(STATES, ("param", "exp_avg", "exp_avg_sq"), strict=True))
    buffer = {names[state]: joined(tensors) for state, tensors in held.items()}
    return {"buckets_coalesced": True, 0: {(torch.bfloat16, torch.float32): buffer}}
