"""A Llama so small that its tensors can be written out: hidden size 3, FFN size 2, one head of size 2, vocabulary 2."""

import torch

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.testing.checkpoint import MemoryCheckpoint

SIZES = {
    "model_type": "llama",
    "hidden_size": 3,
    "intermediate_size": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "vocab_size": 2,
    "max_position_embeddings": 8,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


def tiny_architecture(layers: int = 1) -> Architecture:
    return architecture_from_config({**SIZES, "num_hidden_layers": layers}, "tiny")


def tiny_checkpoint(given: dict[str, list], layers: int = 1) -> MemoryCheckpoint:
    """Ones, except for the ``given`` tensors."""
    architecture = tiny_architecture(layers)
    weights = {spec.name: torch.ones(spec.shape) for spec in architecture.stored}
    weights |= {name: torch.tensor(values) for name, values in given.items()}
    moments = {"exp_avg": weights, "exp_avg_sq": weights}
    return MemoryCheckpoint(architecture, {"weight": weights, **moments}, step=7)
