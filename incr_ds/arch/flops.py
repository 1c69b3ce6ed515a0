"""Counts floating-point operations of training.

Counting follows the usual convention (Kaplan et al. 2020; PaLM, appendix B). A matrix of N elements costs 2 N operations
per token forward and 4 N backward. Attention scores and values cost 4 L H D S forward per token (L layers, H heads of
size D, sequence length S, the causal half not subtracted) and twice that backward. The output projection is counted. The
embedding lookup, norms, activations and recomputation under activation checkpointing are not. A frozen matrix has only
one of the backward pass's two products, and a layer has none if nothing is trained in it or below it. Of a mixture's
experts, those count that one token uses.
"""

from __future__ import annotations

from collections.abc import Collection

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import TensorSpec

LOOKUPS = ("embedding", "positions")


def forward_flops_per_token(architecture: Architecture, sequence_length: int) -> int:
    """Operations of one forward pass per token."""
    matrices = sum(spec.numel for spec in _matrices(architecture))
    sizes = architecture.sizes
    attention = sizes["layers"] * sizes["heads"] * sizes["head_dim"] * sequence_length
    return 2 * matrices + 4 * attention


def layer_flops_per_token(architecture: Architecture, sequence_length: int) -> int:
    """Operations of one decoder layer's forward pass per token."""
    return (forward_flops_per_token(architecture, sequence_length) - head_flops_per_token(architecture)) // max(
        1, architecture.num_layers
    )


def head_flops_per_token(architecture: Architecture) -> int:
    """Operations of the output projection's forward pass per token."""
    matrices = [spec for spec in architecture.tensors if spec.layer is None and spec.role not in LOOKUPS]
    return 2 * sum(spec.numel for spec in matrices if spec.is_matrix)


def training_flops_per_token(
    architecture: Architecture, sequence_length: int, frozen: Collection[str] = frozenset()
) -> int:
    """Operations of forward and backward per token: three times the forward pass if nothing is ``frozen``."""
    sizes = architecture.sizes
    lowest = min(_depth(spec, sizes["layers"]) for spec in architecture.stored if spec.name not in frozen)
    matrices = _matrices(architecture)
    through = sum(spec.numel for spec in matrices if _depth(spec, sizes["layers"]) >= lowest)
    trained = sum(spec.numel for spec in matrices if (spec.tied_to or spec.name) not in frozen)
    attention = sizes["heads"] * sizes["head_dim"] * sequence_length * (sizes["layers"] - max(0, lowest))
    return forward_flops_per_token(architecture, sequence_length) + 2 * (through + trained) + 8 * max(0, attention)


def _matrices(architecture: Architecture) -> list[TensorSpec]:
    """The matrices that multiply a token."""
    return [
        spec
        for spec in architecture.tensors
        if spec.is_matrix and spec.role not in LOOKUPS and architecture.is_active(spec)
    ]


def _depth(spec: TensorSpec, num_layers: int) -> int:
    """The decoder layer of a tensor, -1 below the first, ``num_layers`` above the last."""
    if spec.layer is not None:
        return spec.layer
    return -1 if spec.role in LOOKUPS else num_layers
