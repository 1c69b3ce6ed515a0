"""Checks whether a model can be trained here, and by which teacher."""

from __future__ import annotations

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.family import families, mixtures
from incr_ds.config.training import ObjectiveSettings
from incr_ds.errors import ConfigError, LayoutError

ROUTER_LOSS = 0.001  # transformers' router_aux_loss_coef of Mixtral and Qwen3-MoE


def check_trainable(architecture: Architecture) -> None:
    """Raise LayoutError or ConfigError if models of this family, or with these fields, cannot be trained here."""
    if not architecture.family.training_supported:
        every = families() | mixtures()
        known = ", ".join(name for name, family in every.items() if family.training_supported)
        raise LayoutError(
            f"{architecture.family.model_type} can be grown and exported, but not trained here; supported for training: {known}."
        )
    for field, value in architecture.family.training_requires.items():
        if architecture.config[field] != value:
            raise ConfigError(
                f"{field} is {architecture.config[field]!r}; {architecture.family.model_type} is trained here with {value!r} "
                "only. Set it in the model's config.json."
            )


def check_shared_samples(architecture: Architecture, ranks: int) -> None:
    """Raise LayoutError if ``ranks`` ranks cannot share a sample: in attention each has an equal part of the heads."""
    heads, kv_heads = architecture.sizes["heads"], architecture.sizes["kv_heads"]
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise LayoutError(
            f"batch.sequence_parallel {ranks}: the model has {heads} heads and {kv_heads} key-value heads; it must divide the "
            "first, and divide the second or be a multiple of it."
        )
    if ranks > 1 and "positions" in architecture.sizes:
        raise LayoutError(
            f"batch.sequence_parallel {ranks}: {architecture.family.model_type} has learned positions, with which it is not "
            "supported; set 1."
        )
    if ranks > 1 and "experts" in architecture.sizes:
        raise LayoutError(
            f"batch.sequence_parallel {ranks}: {architecture.family.model_type} is a mixture of experts, whose router loss needs "
            "whole samples; set 1."
        )


def check_vocabularies(student: Architecture, teacher: Architecture) -> None:
    """Raise ConfigError unless both models predict over the same vocabulary."""
    ours, theirs = student.sizes["vocab"], teacher.sizes["vocab"]
    if ours != theirs:
        raise ConfigError(
            f"distillation.teacher: its vocabulary has {theirs} entries, the model's {ours}; they must be the same. "
            "Use the checkpoint that the model was grown from, or train without distillation."
        )


def router_factor(loss: ObjectiveSettings, architecture: Architecture) -> float:
    """The factor of the router loss: 0 for a dense model. Raises ConfigError if one is stated for a dense model."""
    if "experts" in architecture.sizes:
        return ROUTER_LOSS if loss.router is None else loss.router
    if loss.router is not None:
        raise ConfigError(
            f"loss.router: {loss.router:g}: a {architecture.family.model_type} has no router, since it is not a mixture of "
            "experts; remove it."
        )
    return 0.0
