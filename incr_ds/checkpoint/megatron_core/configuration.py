"""Megatron-LM's arguments in a checkpoint, and the Hugging Face config: each follows from the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import Architecture, architecture_from_config, saved_architecture
from incr_ds.errors import CheckpointError, LayoutError

# Arguments under which the model is one of the supported families: of all, and of those with either kind of norm.
_EXPECTED: Mapping[str, Any] = {
    "position_embedding_type": "rope",
    "rotary_interleaved": False,
    "num_experts": None,
    "multi_latent_attention": False,
    "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False,
    "window_size": None,
    "rotary_seq_len_interpolation_factor": None,
    "mtp_num_layers": None,
    "hybrid_override_pattern": None,
    "no_rope_freq": None,
}
_RMS_NORM: Mapping[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "rotary_percent": 1.0,
    "add_bias_linear": False,
}
_LAYER_NORM: Mapping[str, Any] = {  # GPT-NeoX with one residual branch after the other
    "normalization": "LayerNorm",
    "swiglu": False,
    "add_bias_linear": True,
    "qk_layernorm": False,
    "use_rope_scaling": False,
    "squared_relu": False,
    "quick_geglu": False,
    "openai_gelu": False,
}
_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
}
_AXES = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "heads",
    "num_query_groups": "kv_heads",
    "kv_channels": "head_dim",
}
# The constants of Megatron-core's rotary_pos_embedding.py, which are Llama 3.1's.
_LLAMA_3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_GELU = {True: "gelu_new", False: "gelu"}  # with --no-bias-gelu-fusion the exact one
_OTHER_BIASES = ("o_proj.bias", "gate_proj.bias", "up_proj.bias", "down_proj.bias")
_EPS = ("layernorm_epsilon", "norm_epsilon")  # the value of --norm-epsilon: from Megatron-LM 0.16 on, and before
_OPEN = "Give the Hugging Face config of this model with --config FILE."


def chosen_architecture(
    folder: Path, config: Path | None, arguments: Mapping[str, Any], rows: int, where: Path
) -> Architecture:
    """The model, from ``config`` or a config.json in the folder or its parent, otherwise from the run's arguments in ``where``.

    ``rows`` are those of the embedding.
    """
    for path in (config, folder / "config.json", folder.parent / "config.json"):
        if path is not None and (path == config or path.is_file()):
            return saved_architecture(path)
    return architecture_from_config(config_of(arguments, rows, where), f"{where}: args")


def config_of(arguments: Mapping[str, Any], vocabulary: int, where: Path) -> dict[str, Any]:
    """The config of a Llama, Qwen2, Qwen3 or GPT-NeoX with these arguments, whose embedding has ``vocabulary`` rows.

    Raises CheckpointError that names the first argument that is missing, or that no supported family has.
    """
    if not arguments:
        raise CheckpointError(f"{where}: holds no arguments of Megatron-LM, from which the model would follow. {_OPEN}")
    layer_norm = arguments.get("normalization") == "LayerNorm"
    expected = {**_EXPECTED, **(_LAYER_NORM if layer_norm else _RMS_NORM)}
    for name, value in expected.items():
        if arguments.get(name, value) != value:
            raise CheckpointError(
                f"{where}: args.{name}: found {_shown(arguments[name])}, and a config follows from {value!r} only. {_OPEN}"
            )
    config = {field: _number(arguments, name, where) for field, name in _SIZES.items()}
    eps = _number(arguments, _EPS[0] if _EPS[0] in arguments else _EPS[1], where)
    shared = {
        **config,
        "vocab_size": arguments.get("vocab_size") or vocabulary,
        "tie_word_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
    }
    if layer_norm:
        return _gpt_neox(shared, arguments, where) | {"layer_norm_eps": eps}
    return {
        **_family(arguments),
        **shared,
        **_rotary(arguments, where),
        "num_key_value_heads": _key_value_heads(arguments, where),
        "rms_norm_eps": eps,
    }


def arguments_of(architecture: Architecture, where: str) -> dict[str, Any]:
    """The arguments of Megatron-LM that describe a Llama, Mistral, Qwen2, Qwen3 or GPT-NeoX.

    Raises LayoutError that names the first config field that Megatron-core's GPTModel is not known to compute alike.
    """
    config, sizes = architecture.config, architecture.sizes
    for field, reason in _unlike(architecture):
        raise LayoutError(f"{where}: {field}: {reason}; choose another layout.format.")
    own = {name: sizes[axis] for name, axis in _AXES.items()}
    present = {spec.local_name for spec in architecture.stored}
    layer_norm = architecture.family.norm == "layer"
    fixed = {**_EXPECTED, **(_LAYER_NORM if layer_norm else _RMS_NORM)}
    further = _of_layer_norm(config) if layer_norm else _scaling_arguments(config["rope_parameters"])
    return {
        **{name: value for name, value in fixed.items() if value is not None},
        **own,
        **further,
        "max_position_embeddings": config["max_position_embeddings"],
        "group_query_attention": sizes["kv_heads"] != sizes["heads"],
        "vocab_size": sizes["vocab"],
        **dict.fromkeys(_EPS, config["layer_norm_eps" if layer_norm else "rms_norm_eps"]),
        "attention_dropout": config.get("attention_dropout", 0.0),
        "hidden_dropout": config.get("hidden_dropout", 0.0),
        "untie_embeddings_and_output_weights": not architecture.tied,
        "add_qkv_bias": "self_attn.q_proj.bias" in present,
        "qk_layernorm": "self_attn.q_norm.weight" in present,
    }


def _gpt_neox(sizes: Mapping[str, Any], arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The config of a GPT-NeoX, whose heads fill the hidden size and have keys and values of their own."""
    rest = {field: value for field, value in sizes.items() if field != "head_dim"}
    heads, groups = sizes["num_attention_heads"], _key_value_heads(arguments, where)
    if groups != heads or sizes["head_dim"] * heads != sizes["hidden_size"]:
        raise CheckpointError(
            f"{where}: args: {heads} heads of {sizes['head_dim']} with {groups} query groups and a hidden size of "
            f"{sizes['hidden_size']}: under LayerNorm a config follows only if each head has a group and they fill the hidden "
            f"size. {_OPEN}"
        )
    fused = arguments.get("bias_gelu_fusion")
    if not isinstance(fused, bool):
        raise CheckpointError(
            f"{where}: args.bias_gelu_fusion: expected true or false, found {_shown(fused)}; it says whether GELU is the "
            f"approximation with tanh. {_OPEN}"
        )
    rope = {
        "rope_type": "default",
        "rope_theta": float(_number(arguments, "rotary_base", where)),
        "partial_rotary_factor": float(_number(arguments, "rotary_percent", where)),
    }
    own = {"model_type": "gpt_neox", "use_parallel_residual": False, "attention_bias": True, "rope_parameters": rope}
    return {**own, **rest, "hidden_act": _GELU[fused]}


def _of_layer_norm(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = config["rope_parameters"]
    return {
        "rotary_base": int(rope["rope_theta"]),
        "rotary_percent": float(rope.get("partial_rotary_factor", 1.0)),
        "bias_gelu_fusion": config["hidden_act"] == _GELU[True],
    }


def _unlike(architecture: Architecture) -> Iterator[tuple[str, str]]:
    """Config fields that no argument expresses here, each with the reason."""
    config = architecture.config
    if architecture.family.norm == "layer":
        yield from _unlike_gpt_neox(config)
    elif config["hidden_act"] != "silu":
        yield "hidden_act", f"{config['hidden_act']!r}, and --swiglu means 'silu'"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        yield "sliding_window", f"{config['sliding_window']}; only full attention is written for Megatron-core"
    biases = [spec.local_name for spec in architecture.stored if spec.local_name.endswith(_OTHER_BIASES)]
    if biases:
        yield biases[0], "Megatron-core has biases of q, k and v alone, or of all linear layers"
    rope = dict(config["rope_parameters"])
    if not float(rope["rope_theta"]).is_integer():
        yield "rope_parameters.rope_theta", f"{rope['rope_theta']}, and --rotary-base is a whole number"
    scaled = rope.get("rope_type", "default") != "default"
    if scaled and {key: rope.get(key) for key in _LLAMA_3} != _LLAMA_3:
        yield "rope_parameters", f"{rope}; Megatron-core has llama3's scaling with {_LLAMA_3} and a factor"


def _unlike_gpt_neox(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if config["use_parallel_residual"]:
        yield "use_parallel_residual", "true, and Megatron-core's FFN reads what attention has been added to"
    if not config["attention_bias"]:
        yield "attention_bias", "false, and with --disable-bias-linear the FFN has no biases either"
    if config["hidden_act"] not in _GELU.values():
        yield "hidden_act", f"{config['hidden_act']!r}, and Megatron-core has {' and '.join(_GELU.values())}"


def _scaling_arguments(rope: Mapping[str, Any]) -> dict[str, Any]:
    base = {"rotary_base": int(rope["rope_theta"])}
    if rope.get("rope_type", "default") == "default":
        return {**base, "use_rope_scaling": False}
    return {**base, "use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}


def _family(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if arguments.get("qk_layernorm", False):
        return {"model_type": "qwen3", "attention_bias": bool(arguments.get("add_qkv_bias", False))}
    return {"model_type": "qwen2" if arguments.get("add_qkv_bias", False) else "llama"}


def _key_value_heads(arguments: Mapping[str, Any], where: Path) -> Any:
    grouped = arguments.get("group_query_attention", False)
    return _number(arguments, "num_query_groups" if grouped else "num_attention_heads", where)


def _rotary(arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    base: dict[str, Any] = {"rope_theta": float(_number(arguments, "rotary_base", where))}
    if not arguments.get("use_rope_scaling", False):
        return base
    factor = float(_number(arguments, "rope_scaling_factor", where))
    return {**base, "rope_scaling": {**_LLAMA_3, "factor": factor}}


def _number(arguments: Mapping[str, Any], name: str, where: Path) -> Any:
    found = arguments.get(name)
    if not isinstance(found, int | float) or isinstance(found, bool):
        raise CheckpointError(f"{where}: args.{name}: expected a number, found {_shown(found)}. {_OPEN}")
    return found


def _shown(value: Any) -> str:
    return (
        repr(value)
        if isinstance(value, str | int | float | None)
        else f"a {getattr(value, 'name', type(value).__name__)}"
    )
