"""Pico models, in which every axis has a different size so that mixed-up axes show."""

from __future__ import annotations

from typing import Any

from incr_ds.arch.architecture import Architecture, architecture_from_config

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TRAINED_BESIDE = (
    "gpt_neox",
    "gpt2",
    "opt",
    "phi3",
    "olmo2",
    "gemma3_text",
    "gemma2",
    "smollm3",
    "olmo3",
    "ministral3",
    "stablelm",
    "starcoder2",
    "granite",
    "cohere",
)  # small models of these: incr_ds.testing.memory
MIXTURES = ("mixtral", "qwen3_moe")  # and of these


def pico_config(family: str = "llama", *, tied: bool = False, **changes: Any) -> dict[str, Any]:
    """A Hugging Face config: hidden 24, 6 query and 3 key-value heads of 8, FFN 50, vocabulary 101, 3 layers."""
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": 101,
        "hidden_size": 24,
        "intermediate_size": 50,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
    }
    if family == "qwen2":
        # Qwen2 has no head_dim of its own.
        config.update(hidden_size=48)
        del config["head_dim"]
    if family == "mistral":
        config["sliding_window"] = 5
    return config | changes


def pico_architecture(family: str = "llama", *, tied: bool = False, **changes: Any) -> Architecture:
    """The architecture of ``pico_config``."""
    return architecture_from_config(pico_config(family, tied=tied, **changes), f"pico {family}")
