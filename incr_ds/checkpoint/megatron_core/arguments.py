"""Megatron-LM's arguments of a model: those that every supported model has, and those of one architecture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from incr_ds.arch.architecture import Architecture
from incr_ds.errors import LayoutError

Kind = Literal["dense", "mixture", "gpt_neox", "gpt2"]  # the first two under RMSNorm, like Llama

# Arguments under which the model is one of the supported families. One that is missing has this value.
_ALL: Mapping[str, Any] = {
    "multi_latent_attention": False,
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "window_size": None,
    "mtp_num_layers": None,
    "hybrid_override_pattern": None,
}
_ROTARY: Mapping[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
    "rotary_seq_len_interpolation_factor": None,
    "no_rope_freq": None,
}
_RMS_NORM: Mapping[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "rotary_percent": 1.0,
    "add_bias_linear": False,
}
_DENSE: Mapping[str, Any] = {"num_experts": None}
_MIXTURE: Mapping[str, Any] = {  # the shares of the chosen experts sum to 1, and nothing else decides which are chosen
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_router_topk_limited_devices": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_force_load_balancing": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_expert_capacity_factor": None,
    "moe_input_jitter_eps": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
}
_LAYER_NORM: Mapping[str, Any] = {
    **_DENSE,
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "qk_layernorm": False,
    "use_rope_scaling": False,
    "squared_relu": False,
    "quick_geglu": False,
    "openai_gelu": False,
}
FIXED: Mapping[Kind, Mapping[str, Any]] = {
    "dense": {**_ALL, **_ROTARY, **_RMS_NORM, **_DENSE},
    "mixture": {**_ALL, **_ROTARY, **_RMS_NORM, **_MIXTURE},
    "gpt_neox": {**_ALL, **_ROTARY, **_LAYER_NORM},  # with one residual branch after the other
    "gpt2": {**_ALL, "position_embedding_type": "learned_absolute", **_LAYER_NORM},
}
AXES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "heads",
    "num_query_groups": "kv_heads",
    "kv_channels": "head_dim",
}
# The constants of Megatron-core's rotary_pos_embedding.py, which are Llama 3.1's.
LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GELU = {True: "gelu_new", False: "gelu"}  # by bias_gelu_fusion: with --no-bias-gelu-fusion the exact one
EPS = ("layernorm_epsilon", "norm_epsilon")  # the value of --norm-epsilon: from Megatron-LM 0.16 on, and before
_OTHER_BIASES = ("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")


def kind_of(architecture: Architecture) -> Kind:
    """What decides the fixed arguments of a model that Megatron-core has."""
    known: dict[str, Kind] = {"gpt_neox": "gpt_neox", "gpt2": "gpt2"}
    return known.get(architecture.family.model_type, "mixture" if "experts" in architecture.sizes else "dense")


def arguments_of(architecture: Architecture, where: str) -> dict[str, Any]:
    """The arguments of Megatron-LM that describe a model of one of Megatron-core's families.

    Raises LayoutError that names the first config field that Megatron-core's GPTModel is not known to compute alike.
    """
    for field, reason in _unlike(architecture):
        raise LayoutError(f"{where}: {field}: {reason}; choose another layout.format.")
    config, sizes, kind = architecture.config, architecture.sizes, kind_of(architecture)
    present = {spec.local_name for spec in architecture.stored}
    return {
        **{name: value for name, value in FIXED[kind].items() if value is not None},
        **{name: sizes[axis] for name, axis in AXES.items()},
        **_FURTHER[kind](config),
        **(_mixture(architecture) if kind == "mixture" else {}),
        "max_position_embeddings": sizes.get("positions") or config["max_position_embeddings"],
        "group_query_attention": sizes["kv_heads"] != sizes["heads"],
        "vocab_size": sizes["vocab"],
        **dict.fromkeys(EPS, config[str(architecture.family.config.eps)]),
        "untie_embeddings_and_output_weights": not architecture.tied,
        "add_qkv_bias": "self_attn.q_proj.bias" in present,
        "qk_layernorm": "self_attn.q_norm.weight" in present,
    }


def _dense(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    scaled = rope.get("rope_type", "default") != "default"
    return {
        "rotary_base": int(rope["rope_theta"]),
        "use_rope_scaling": scaled,
        **({"rope_scaling_factor": float(rope["factor"])} if scaled else {}),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
    }


def _mixture(architecture: Architecture) -> dict[str, Any]:
    """Without the coefficient of the loss that balances experts: transformers' loss is another one."""
    return {
        "num_experts": architecture.sizes["experts"],
        "moe_ffn_hidden_size": architecture.sizes["ffn"],
        "moe_router_topk": architecture.active_experts,
    }


def _gpt_neox(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return {
        "rotary_base": int(rope["rope_theta"]),
        "rotary_percent": float(rope.get("partial_rotary_factor", 1.0)),
        "bias_gelu_fusion": config["hidden_act"] == GELU[True],
        "attention_dropout": config["attention_dropout"],
        "hidden_dropout": config["hidden_dropout"],
    }


def _gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bias_gelu_fusion": config["activation_function"] == GELU[True],
        "attention_dropout": config["attn_pdrop"],
        "hidden_dropout": config["resid_pdrop"],
    }


_FURTHER = {"dense": _dense, "mixture": _dense, "gpt_neox": _gpt_neox, "gpt2": _gpt2}


def _unlike(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """Config fields that no argument expresses here, each with the reason."""
    config = architecture.config
    yield from _UNLIKE[kind_of(architecture)](config)
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        yield "sliding_window", f"{config['sliding_window']}; only full attention is written for Megatron-core"
    biases = [spec.local_name for spec in architecture.stored if spec.local_name.endswith(_OTHER_BIASES)]
    if biases:
        yield biases[0], "Megatron-core has biases of q, k and v alone, or of all linear layers"
    if "rope_parameters" in config:
        yield from _unlike_rotary(config["rope_parameters"])


def _unlike_rotary(rope: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not float(rope["rope_theta"]).is_integer():
        yield "rope_parameters.rope_theta", f"{rope['rope_theta']}, and --rotary-base is a whole number"
    scaled = rope.get("rope_type", "default") != "default"
    if scaled and {key: rope.get(key) for key in LLAMA_3} != LLAMA_3:
        yield "rope_parameters", f"{dict(rope)}; Megatron-core has llama3's scaling with {LLAMA_3} and a factor"


def _unlike_dense(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if config["hidden_act"] != "silu":
        yield "hidden_act", f"{config['hidden_act']!r}, and --swiglu means 'silu'"


def _unlike_mixture(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from _unlike_dense(config)
    if config["num_experts_per_tok"] == 1:
        yield "num_experts_per_tok", "1, and Megatron-core weighs a single expert by its share among all"
    if config.get("router_jitter_noise"):
        yield (
            "router_jitter_noise",
            f"{config['router_jitter_noise']}, and Megatron-core has noise for the router alone",
        )


def _unlike_gpt_neox(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if config["use_parallel_residual"]:
        yield "use_parallel_residual", "true, and Megatron-core's FFN reads what attention has been added to"
    if not config["attention_bias"]:
        yield "attention_bias", "false, and with --disable-bias-linear the FFN has no biases either"
    yield from _unlike_gelu("hidden_act", config)


def _unlike_gpt2(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if not config["scale_attn_weights"]:
        yield "scale_attn_weights", "false, and Megatron-core divides attention scores by the root of the head's size"
    if config["embd_pdrop"] != config["resid_pdrop"]:
        yield "embd_pdrop", f"{config['embd_pdrop']}, and --hidden-dropout is that of resid_pdrop, too"
    yield from _unlike_gelu("activation_function", config)


def _unlike_gelu(field: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if config[field] not in GELU.values():
        yield field, f"{config[field]!r}, and Megatron-core has {' and '.join(GELU.values())}"


_UNLIKE = {"dense": _unlike_dense, "mixture": _unlike_mixture, "gpt_neox": _unlike_gpt_neox, "gpt2": _unlike_gpt2}
