"""Megatron-DeepSpeed's files as its own code would cut them, in whole tensors: an oracle for reader and writer.

From megatron/model/transformer.py and gpt_model.py: q, k and v of a key-value group lie together; each tensor rank has its
gate rows, then its up rows; the vocabulary is padded to a multiple; the stages of partition_method type:transformer.
"""

import argparse
import math
import random
from pathlib import Path

import numpy as np
import torch

VOCABULARY_MULTIPLE = 8


def fused(tensors, prefix, kv_heads, ranks, rank):
    """One decoder layer's parameters on one tensor rank, in the module's order."""
    t = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    q, k, v = (t[f"self_attn.{x}_proj.weight"] for x in "qkv")
    hidden = q.shape[1]
    groups = torch.cat([x.view(kv_heads, -1, hidden) for x in (q, k, v)], dim=1)
    gate, up = (t[f"mlp.{x}_proj.weight"].chunk(ranks)[rank] for x in ("gate", "up"))
    return {
        "input_layernorm.weight": t["input_layernorm.weight"],
        "self_attention.query_key_value.weight": groups.reshape(-1, hidden).chunk(ranks)[rank],
        "self_attention.dense.weight": t["self_attn.o_proj.weight"].chunk(ranks, dim=1)[rank],
        "post_attention_layernorm.weight": t["post_attention_layernorm.weight"],
        "mlp.dense_h_to_4h.weight": torch.cat([gate, up]),
        "mlp.dense_4h_to_h.weight": t["mlp.down_proj.weight"].chunk(ranks, dim=1)[rank],
    }


def padded(weight, ranks, rank, filling):
    unit = VOCABULARY_MULTIPLE * ranks
    rows = math.ceil(len(weight) / unit) * unit - len(weight)
    return torch.cat([weight, torch.full((rows, weight.shape[1]), filling)]).chunk(ranks)[rank]


def layers_of(tensors, layers, kv_heads, ranks, rank, filling=0.0):
    """{pipeline layer: {name: tensor}} of one tensor rank."""
    found = {1: {"word_embeddings.weight": padded(tensors["model.embed_tokens.weight"], ranks, rank, filling)}}
    for layer in range(layers):
        found[2 + layer] = fused(tensors, f"model.layers.{layer}.", kv_heads, ranks, rank)
    found[2 + layers] = {"weight": tensors["model.norm.weight"]}
    if "lm_head.weight" in tensors:
        found[3 + layers] = {"lm_head.weight": padded(tensors["lm_head.weight"], ranks, rank, filling)}
    return found


def stage_of(layers, stages, stage, by_layer, tied):
    """{parameter: tensor} of a stage, tied ones first."""
    sizes = [layers // stages + (s < layers % stages) for s in range(stages)]
    first = 2 + sum(sizes[:stage]) if stage else 0
    last = 2 + sum(sizes[: stage + 1]) if stage < stages - 1 else 4 + layers
    found = {}
    if tied and stage in (0, stages - 1):
        found = {f"tied_modules.embed.{name}": tensor for name, tensor in by_layer[1].items()}
    for layer, items in by_layer.items():
        if first <= layer < last and not (tied and layer == 1):
            found |= {f"{layer}.{name}": tensor for name, tensor in items.items()}
    return found


def partitions(parameters, data_ranks):
    """Per parameter group (matrices, vectors): one flat tensor per data rank."""
    groups = [[p for p in parameters.values() if (p.ndim > 1) == matrices] for matrices in (True, False)]
    found = []
    for group in groups:
        flat = torch.cat([p.reshape(-1) for p in group])
        unit = 2 * data_ranks
        flat = torch.cat([flat, torch.zeros(-len(flat) % unit)])
        found.append((flat.chunk(data_ranks), sum(p.numel() for p in group)))
    return found


def shapes(parameters):
    return [{n: p.shape for n, p in parameters.items() if (p.ndim > 1) == matrices} for matrices in (True, False)]


def write(folder, states, layers, kv_heads, tensor, stages, data, tied):
    """A checkpoint with the arguments and random states that Megatron-DeepSpeed adds; padding rows were trained (7)."""
    tag = Path(folder) / "global_step3"
    tag.mkdir(parents=True)
    (Path(folder) / "latest").write_text("global_step3")
    extra = {
        "args": argparse.Namespace(hidden_size=48, params_dtype=torch.float32, lr=1e-4),
        "checkpoint_version": 3.0,
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
    }
    for rank in range(tensor):
        cut = {state: layers_of(tensors, layers, kv_heads, tensor, rank, 7.0) for state, tensors in states.items()}
        for layer, items in cut["weight"].items():
            torch.save(items, tag / f"layer_{layer:02d}-model_{rank:02d}-model_states.pt")
        for stage in range(stages):
            held = {state: stage_of(layers, stages, stage, by_layer, tied) for state, by_layer in cut.items()}
            model = {
                "module": None,
                "param_shapes": shapes(held["weight"]),
                "dp_world_size": data,
                "buffer_names": [],
                "mp_world_size": tensor * stages,
                "global_steps": 3,
                "shared_params": {},
                **extra,
            }
            index = stage * tensor + rank
            torch.save(model, tag / f"mp_rank_{index:02d}_model_states.pt")
            flat = {state: partitions(parameters, data) for state, parameters in held.items()}
            for number in range(data):
                moments = {group: _adam(flat, group, number) for group in range(2)}
                groups = [
                    {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": decay, "params": [group]}
                    for group, decay in enumerate((0.1, 0.0))
                ]
                state = {
                    "base_optimizer_state": {"state": moments, "param_groups": groups},
                    "single_partition_of_fp32_groups": [parts[number].clone() for parts, _ in flat["weight"]],
                    "zero_stage": 1,
                    "partition_count": [data, data],
                }
                name = f"zero_pp_rank_{number}_mp_rank_{index:02d}_optim_states.pt"
                torch.save({"optimizer_state_dict": state}, tag / name)


def _adam(flat, group, number):
    moments = {moment: flat[moment][group][0][number].clone() for moment in ("exp_avg", "exp_avg_sq")}
    return {"step": torch.tensor(3.0), **moments}
