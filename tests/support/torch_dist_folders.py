"""Checkpoints in Megatron-core's format whose shards torch.distributed.checkpoint itself writes, without ranks."""

import argparse
import io
import json
import math
import pickle
import warnings
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

STATES = ("weight", "exp_avg", "exp_avg_sq")
PREFIX = {
    "weight": "optimizer.state.fp32_param.",
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}
MULTIPLE = 8


def parameters_of(source, state, with_ffn=True):
    """The parameters of Megatron-core's GPTModel, with stacked layers, from a logical checkpoint."""

    def read(name):
        return source.read(name, state)

    def stacked(layer_of):
        return torch.stack([layer_of(f"model.layers.{layer}.") for layer in range(source.architecture.num_layers)])

    def qkv(inside):
        parts = [read(f"{inside}self_attn.{x}_proj.weight") for x in "qkv"]
        groups = source.architecture.sizes["kv_heads"]
        return torch.cat([part.view(groups, -1, part.shape[1]) for part in parts], dim=1).flatten(0, 1)

    def padded(weight):
        rows = math.ceil(len(weight) / MULTIPLE) * MULTIPLE - len(weight)
        return torch.cat([weight, torch.full((rows, weight.shape[1]), 9.0)])

    found = {
        "embedding.word_embeddings.weight": padded(read("model.embed_tokens.weight")),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight": stacked(
            lambda i: read(f"{i}input_layernorm.weight")
        ),
        "decoder.layers.self_attention.linear_qkv.weight": stacked(qkv),
        "decoder.layers.self_attention.linear_proj.weight": stacked(lambda i: read(f"{i}self_attn.o_proj.weight")),
        "decoder.final_layernorm.weight": read("model.norm.weight"),
    }
    if with_ffn:
        found |= {
            "decoder.layers.mlp.linear_fc1.layer_norm_weight": stacked(
                lambda i: read(f"{i}post_attention_layernorm.weight")
            ),
            "decoder.layers.mlp.linear_fc1.weight": stacked(
                lambda i: torch.cat([read(f"{i}mlp.{x}_proj.weight") for x in ("gate", "up")])
            ),
            "decoder.layers.mlp.linear_fc2.weight": stacked(lambda i: read(f"{i}mlp.down_proj.weight")),
        }
    if not source.architecture.tied:
        found["output_layer.weight"] = padded(read("lm_head.weight"))
    return found


def arguments_of(architecture, **further):
    sizes = architecture.sizes
    given = {
        "num_layers": sizes["layers"],
        "hidden_size": sizes["hidden"],
        "ffn_hidden_size": sizes["ffn"],
        "num_attention_heads": sizes["heads"],
        "num_query_groups": sizes["kv_heads"],
        "group_query_attention": True,
        "kv_channels": sizes["head_dim"],
        "vocab_size": sizes["vocab"],
        "max_position_embeddings": architecture.config["max_position_embeddings"],
        "rotary_base": architecture.config["rope_parameters"]["rope_theta"],
        "norm_epsilon": architecture.config["rms_norm_eps"],
        "normalization": "RMSNorm",
        "swiglu": True,
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not architecture.tied,
    }
    return argparse.Namespace(**{**given, **further})


def write_folder(folder: Path, tensors, common):
    """An iteration's folder, named in the file beside it."""
    inner = folder / "iter_0000007"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(tensors, checkpoint_id=inner, no_dist=True)
    torch.save(common, inner / "common.pt")
    (inner / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / "latest_checkpointed_iteration.txt").write_text("7\n")
    return inner


def flatten(inner: Path, keys, tensor_ranks, data_ranks):
    """Store the tensors ``keys`` of a folder anew, as Megatron-core 0.13's distributed optimizer did.

    Every layer is a part, and gate and up are two. Each tensor rank has its share of these along the dimension that it cuts.
    A part's elements are divided over data-parallel ranks, at places that do not follow its rows.
    """
    metadata = dcp.FileSystemReader(inner).read_metadata()
    held = {key: torch.empty(metadata.state_dict_metadata[key].size) for key in keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(held, checkpoint_id=inner, no_dist=True)
    metadata.mcore_data = {key: {} for key in metadata.state_dict_metadata}
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn not in held}
    for key, tensor in held.items():
        chunks = []
        counts = _parts(key, tensor, tensor_ranks)
        sizes = [size // count for size, count in zip(tensor.shape, counts, strict=True)]
        for number in product(*map(range, counts)):
            cuts = tuple(slice(n * size, (n + 1) * size) for n, size in zip(number, sizes, strict=True))
            part = tensor[cuts].reshape(-1)
            ends = [(len(part) * rank + rank) // data_ranks for rank in range(data_ranks)] + [len(part)]
            for rank, (begin, end) in enumerate(pairwise(ends)):
                file = f"__{rank}_1.distcp"
                place = _append(inner / file, part[begin:end].view(*(1 for _ in number), -1).clone())
                offsets = torch.Size((*number, begin))
                chunks.append(ChunkStorageMetadata(offsets, torch.Size((*(1 for _ in number), end - begin))))
                metadata.storage_data[MetadataIndex(key, offsets)] = _StorageInfo(file, *place)
        entry = metadata.state_dict_metadata[key]
        entry.size, entry.chunks = torch.Size((*counts, math.prod(sizes))), chunks
        metadata.mcore_data[key] = {"nd_reformulated_orig_global_shape": tuple(tensor.shape)}
    (inner / ".metadata").write_bytes(pickle.dumps(metadata))


def _parts(key, tensor, ranks):
    counts = [1] * tensor.dim()
    if "decoder.layers." in key:
        counts[0] = len(tensor)
    if "experts" in key:
        counts[1] = tensor.shape[1]
    if key.endswith(("linear_proj.weight", "linear_fc2.weight")):
        counts[-1] = ranks
    elif key.endswith(("linear_qkv.weight", "linear_fc1.weight")):
        counts[-2] = ranks * (2 if "fc1" in key else 1)
    elif key.endswith(("word_embeddings.weight", "output_layer.weight")):
        counts[0] = ranks
    return counts


def _append(path, tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    with open(path, "ab") as stream:
        offset = stream.tell()
        stream.write(buffer.getbuffer())
    return offset, buffer.tell()


def write_source(folder: Path, source, change=lambda tensors: tensors, **further):
    """A source's weights in bf16, its masters, moments and step, as a mixed-precision run has them."""
    tensors = {key: tensor.bfloat16() for key, tensor in parameters_of(source, "weight").items()}
    for state in STATES:
        tensors |= {PREFIX[state] + key: tensor for key, tensor in parameters_of(source, state).items()}
    group = {"lr": 0.1, "wd_mult": 1.0, "step": source.facts.step}
    common = {
        "args": arguments_of(source.architecture, **further),
        "iteration": 7,
        "checkpoint_version": 3.0,
        "optimizer": {"optimizer": {"param_groups": [group]}, "param_state_sharding_type": "fully_reshardable"},
    }
    return write_folder(folder, change(tensors), common)
