"""Checkpoints in memory, and models whose every parameter is drawn, so that no tensor hides behind ones or zeros."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from incr_ds.arch.architecture import Architecture, architecture_from_config
from incr_ds.arch.logical import CheckpointFacts, State

SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 250,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}


class MemoryCheckpoint:
    """Tensors by state and name as a logical checkpoint."""

    def __init__(
        self, architecture: Architecture, tensors: Mapping[State, Mapping[str, torch.Tensor]], step: int | None = None
    ) -> None:
        self.architecture = architecture
        self._tensors = tensors
        self.facts = CheckpointFacts(Path("memory"), "memory", tuple(tensors), step, {}, {}, ())

    def read(self, name: str, state: State = "weight", rows: slice | None = None) -> torch.Tensor:
        """Rows of one tensor."""
        spec = self.architecture.by_name[name]
        return self._tensors[state][spec.tied_to or name][rows or slice(None)]

    def self_check(self) -> Iterator[str]:
        """Nothing to check."""
        yield from self._tensors["weight"]


def small_architecture(family: str, **changes: Any) -> Architecture:
    """A tiny model with a different size on every axis; ``changes`` are config fields."""
    return architecture_from_config({"model_type": family, **SMALL, **changes}, "test")


def drawn_model(architecture: Architecture, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """transformers' model with every parameter drawn: matrices at their usual scale, norms around 1, biases around 0."""
    config = AutoConfig.for_model(**{**architecture.config, "model_type": architecture.family.model_type})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        centre, spread = (1.0, 0.2) if "norm" in name else (0.0, 0.05)
        parameter.data.copy_(centre + spread * drawn)
    return model


def model_checkpoint(
    architecture: Architecture, model: PreTrainedModel, with_moments: bool = False
) -> MemoryCheckpoint:
    """A model's weights (and drawn moments) as a logical checkpoint."""
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    if not with_moments:
        return MemoryCheckpoint(architecture, {"weight": weights})
    generator = torch.Generator().manual_seed(7)
    first = {name: torch.randn(w.shape, generator=generator, dtype=w.dtype) for name, w in weights.items()}
    second = {name: torch.rand(w.shape, generator=generator, dtype=w.dtype) + 0.1 for name, w in weights.items()}
    return MemoryCheckpoint(architecture, {"weight": weights, "exp_avg": first, "exp_avg_sq": second}, step=100)
