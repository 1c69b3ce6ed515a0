"""The Hugging Face config that follows from Megatron-LM's arguments in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incr_ds.errors import CheckpointError

# Arguments under which the model is one of the supported families.
_EXPECTED: Mapping[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "add_bias_linear": False,
    "num_experts": None,
    "multi_latent_attention": False,
    "apply_layernorm_1p": False,
    "window_size": None,
    "rotary_seq_len_interpolation_factor": None,
    "mtp_num_layers": None,
    "hybrid_override_pattern": None,
    "no_rope_freq": None,
}
_SIZES = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
}
_OPEN = "Give the Hugging Face config of this model with --config FILE."


def config_of(arguments: Mapping[str, Any], vocabulary: int, where: Path) -> dict[str, Any]:
    """The config of a Llama, Qwen2 or Qwen3 with these arguments, whose embedding has ``vocabulary`` rows.

    Raises CheckpointError that names the first argument that is missing, or that no supported family has.
    """
    if not arguments:
        raise CheckpointError(f"{where}: holds no arguments of Megatron-LM, from which the model would follow. {_OPEN}")
    for name, expected in _EXPECTED.items():
        if arguments.get(name, expected) != expected:
            raise CheckpointError(
                f"{where}: args.{name}: found {_shown(arguments[name])}, and a config follows from {expected!r} only. {_OPEN}"
            )
    config = {field: _number(arguments, name, where) for field, name in _SIZES.items()}
    tied = not arguments.get("untie_embeddings_and_output_weights", False)
    return {
        **_family(arguments),
        **config,
        **_rotary(arguments, where),
        "num_key_value_heads": _key_value_heads(arguments, where),
        "vocab_size": arguments.get("vocab_size") or vocabulary,
        "rms_norm_eps": _number(arguments, "norm_epsilon", where),
        "tie_word_embeddings": tied,
    }


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
    # The constants of Megatron-core's rotary_pos_embedding.py, which are Llama 3.1's.
    scaling = {
        "rope_type": "llama3",
        "factor": float(_number(arguments, "rope_scaling_factor", where)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {**base, "rope_scaling": scaling}


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
