"""Small models whose every parameter is drawn, so that no tensor hides behind ones or zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.arch.family import family_of
from incr_ds.offline.compare import logical_parts
from incr_ds.testing.checkpoint import MemoryCheckpoint

# A different size on every axis; where a family takes the head's size from hidden / heads, it is 16.
SMALL = {
    "hidden": 96,
    "layers": 3,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 8,
    "ffn": 250,
    "vocab": 101,
    "positions": 64,
    "experts": 4,
}
OWN_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "opt": {"word_embed_proj_dim": 96},
    "phi3": {"pad_token_id": None},
    "smollm3": {"pad_token_id": None, "no_rope_layers": [1, 0, 1]},
    "olmo3": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "starcoder2": {"sliding_window": 9},
    "gemma2": {"query_pre_attn_scalar": 12, "sliding_window": 9},
    "qwen3_moe": {"num_experts_per_tok": 2, "norm_topk_prob": True},
    "gemma3_text": {"query_pre_attn_scalar": 12, "sliding_window": 9, "sliding_window_pattern": 2},
}


def small_architecture(model_type: str, **changes: Any) -> Architecture:
    """A tiny model with a different size on every axis; ``changes`` are config fields."""
    family = family_of(model_type, "test")
    sizes = {field: SMALL[axis] for axis, field in family.axes.items()}
    if "max_position_embeddings" in family.known_fields:
        sizes["max_position_embeddings"] = SMALL["positions"]
    return architecture_from_config(
        {"model_type": model_type, **sizes, **OWN_FIELDS.get(model_type, {}), **changes}, "test"
    )


def drawn_model(architecture: Architecture, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """transformers' model with every parameter drawn: matrices at their usual scale, norms around 1, biases around 0."""
    config = AutoConfig.for_model(**{**architecture.config, "model_type": architecture.family.model_type})
    eager = {"experts_implementation": "eager"} if architecture.family.joined else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager)
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in logical_parts(architecture, dict(model.named_parameters())).items():
        spec = architecture.by_name[name]
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        is_scale = spec.dims[-1].use in ("scale", "post")
        centre, spread = (1.0 - spec.offset, 0.2) if is_scale else (0.0, 0.05)
        parameter.data.copy_(centre + spread * drawn)
    return model


def model_checkpoint(
    architecture: Architecture, model: PreTrainedModel, with_moments: bool = False
) -> MemoryCheckpoint:
    """A model's weights (and drawn moments) as a logical checkpoint."""
    weights = logical_parts(architecture, {name: parameter.data for name, parameter in model.named_parameters()})
    if not with_moments:
        return MemoryCheckpoint(architecture, {"weight": weights})
    generator = torch.Generator().manual_seed(7)
    first = {name: torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in weights.items()}
    second = {name: torch.rand(w.shape, generator=generator, dtype=w.dtype) + 0.1 for name, w in weights.items()}
    return MemoryCheckpoint(architecture, {"weight": weights, "exp_avg": first, "exp_avg_sq": second}, step=100)
