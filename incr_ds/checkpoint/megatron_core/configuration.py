"""The Hugging Face config that follows from Megatron-LM's arguments in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import Architecture, architecture_from_config, saved_architecture
from incr_ds.arch.family import Family, family_of
from incr_ds.checkpoint.megatron_core.arguments import AXES, EPS, FIXED, GELU, LLAMA_3, Kind
from incr_ds.errors import CheckpointError

_OPEN = "Give the Hugging Face config of this model with --config FILE."
_DROPOUT = 0.1  # Megatron-LM's default


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
    """The config of a model with these arguments, whose embedding has ``vocabulary`` rows.

    Raises CheckpointError that names the first argument that is missing, or that no supported family has.
    """
    if not arguments:
        raise CheckpointError(f"{where}: holds no arguments of Megatron-LM, from which the model would follow. {_OPEN}")
    kind = _kind(arguments)
    for name, value in FIXED[kind].items():
        if not _is(arguments.get(name, value), value):
            raise CheckpointError(
                f"{where}: args.{name}: found {_shown(arguments[name])}, and a config follows from {value!r} only. {_OPEN}"
            )
    family = family_of(_family(kind, arguments), str(where))
    sizes = _sizes(arguments, vocabulary, where)
    _check_heads(family, sizes, where)
    return {
        "model_type": family.model_type,
        **{field: sizes[axis] for axis, field in family.axes.items()},
        str(family.config.eps): _number(arguments, EPS[0] if EPS[0] in arguments else EPS[1], where),
        "tie_word_embeddings": not arguments.get("untie_embeddings_and_output_weights", False),
        **_FURTHER[kind](arguments, where),
    }


def _kind(arguments: Mapping[str, Any]) -> Kind:
    if arguments.get("normalization") != "LayerNorm":
        return "dense" if arguments.get("num_experts") is None else "mixture"
    return "gpt2" if arguments.get("position_embedding_type") == "learned_absolute" else "gpt_neox"


def _is(found: Any, value: Any) -> bool:
    """Whether an argument has a value; a list states it layer by layer."""
    return bool(found == value or (isinstance(found, list) and found and all(item == value for item in found)))


def _family(kind: Kind, arguments: Mapping[str, Any]) -> str:
    normed = arguments.get("qk_layernorm", False)
    if kind == "mixture":
        return "qwen3_moe" if normed else "mixtral"
    if kind == "dense":
        return "qwen3" if normed else "qwen2" if arguments.get("add_qkv_bias", False) else "llama"
    return kind


def _sizes(arguments: Mapping[str, Any], vocabulary: int, where: Path) -> dict[str, int]:
    """The size of every axis."""
    grouped = arguments.get("group_query_attention", False)
    own = {axis: name for name, axis in AXES.items()} | {"positions": "max_position_embeddings"}
    own["kv_heads"] = own["kv_heads" if grouped else "heads"]
    if arguments.get("num_experts") is not None:
        own["experts"] = "num_experts"
        own["ffn"] = own["ffn"] if arguments.get("moe_ffn_hidden_size") is None else "moe_ffn_hidden_size"
    found = {axis: _number(arguments, name, where) for axis, name in own.items()}
    return {**found, "vocab": arguments.get("vocab_size") or vocabulary}


def _check_heads(family: Family, sizes: Mapping[str, int], where: Path) -> None:
    """Raise CheckpointError if a family whose heads fill the hidden size, each with its keys and values, has others."""
    heads, groups = sizes["heads"], sizes["kv_heads"]
    if "kv_heads" not in family.axes and (groups != heads or sizes["head_dim"] * heads != sizes["hidden"]):
        raise CheckpointError(
            f"{where}: args: {heads} heads of {sizes['head_dim']} with {groups} query groups and a hidden size of "
            f"{sizes['hidden']}: under LayerNorm a config follows only if each head has a group and they fill the hidden size. "
            f"{_OPEN}"
        )


def _dense(arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    config: dict[str, Any] = {
        "max_position_embeddings": _number(arguments, "max_position_embeddings", where),
        "rope_theta": float(_number(arguments, "rotary_base", where)),
    }
    if arguments.get("use_rope_scaling", False):
        factor = float(_number(arguments, "rope_scaling_factor", where))
        config["rope_scaling"] = {**LLAMA_3, "factor": factor}
    if arguments.get("qk_layernorm", False):
        config["attention_bias"] = bool(arguments.get("add_qkv_bias", False))
    return config


def _mixture(arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    balanced = arguments.get("moe_router_load_balancing_type")
    if "sinkhorn" in (balanced if isinstance(balanced, list) else [balanced]):
        raise CheckpointError(
            f"{where}: args.moe_router_load_balancing_type: found 'sinkhorn', which weighs experts in another way. {_OPEN}"
        )
    shares = {"norm_topk_prob": True} if arguments.get("qk_layernorm", False) else {}  # a Mixtral's always sum to 1
    return {**_dense(arguments, where), **shares, "num_experts_per_tok": _number(arguments, "moe_router_topk", where)}


def _gpt_neox(arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "rope_theta": float(_number(arguments, "rotary_base", where)),
        "partial_rotary_factor": float(_number(arguments, "rotary_percent", where)),
    }
    return {
        "use_parallel_residual": False,
        "attention_bias": True,
        "rope_parameters": rope,
        "max_position_embeddings": _number(arguments, "max_position_embeddings", where),
        "hidden_act": _gelu(arguments, where),
    }


def _gpt2(arguments: Mapping[str, Any], where: Path) -> dict[str, Any]:
    hidden = arguments.get("hidden_dropout", _DROPOUT)
    return {
        "activation_function": _gelu(arguments, where),
        "attn_pdrop": arguments.get("attention_dropout", _DROPOUT),
        "resid_pdrop": hidden,
        "embd_pdrop": hidden,
    }


_FURTHER = {"dense": _dense, "mixture": _mixture, "gpt_neox": _gpt_neox, "gpt2": _gpt2}


def _gelu(arguments: Mapping[str, Any], where: Path) -> str:
    fused = arguments.get("bias_gelu_fusion")
    if not isinstance(fused, bool):
        raise CheckpointError(
            f"{where}: args.bias_gelu_fusion: expected true or false, found {_shown(fused)}; it says whether GELU is the "
            f"approximation with tanh. {_OPEN}"
        )
    return GELU[fused]


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
