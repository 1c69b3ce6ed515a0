"""Counts floating-point operations of training, and states the hardware's peak.

Counting follows the usual convention (Kaplan et al. 2020; PaLM, appendix B). A matrix of N elements costs 2 N operations
per token forward and 4 N backward. Attention scores and values cost 4 L H D S forward per token (L layers, H heads of
size D, sequence length S, the causal half not subtracted) and twice that backward. The output projection is counted. The
embedding lookup, norms, activations and recomputation under activation checkpointing are not. A frozen matrix has only
one of the backward pass's two products, and a layer has none if nothing is trained in it or below it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import TensorSpec

# Dense bf16 operations per second of one device, from its vendor's data sheet. The first name contained in its name counts.
KNOWN_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10": 125e12,
    "L4": 121e12,
}
LOOKUPS = ("embedding", "positions")


@dataclass(frozen=True)
class Peak:
    """Operations per second of one process's device, and where the number comes from."""

    flops_per_second: float
    origin: str


def forward_flops_per_token(architecture: Architecture, sequence_length: int) -> int:
    """Operations of one forward pass per token."""
    matrices = sum(spec.numel for spec in architecture.tensors if spec.is_matrix and spec.role not in LOOKUPS)
    sizes = architecture.sizes
    attention = sizes["layers"] * sizes["heads"] * sizes["head_dim"] * sequence_length
    return 2 * matrices + 4 * attention


def training_flops_per_token(
    architecture: Architecture, sequence_length: int, frozen: Collection[str] = frozenset()
) -> int:
    """Operations of forward and backward per token: three times the forward pass if nothing is ``frozen``."""
    sizes = architecture.sizes
    lowest = min(_depth(spec, sizes["layers"]) for spec in architecture.stored if spec.name not in frozen)
    matrices = [spec for spec in architecture.tensors if spec.is_matrix and spec.role not in LOOKUPS]
    through = sum(spec.numel for spec in matrices if _depth(spec, sizes["layers"]) >= lowest)
    trained = sum(spec.numel for spec in matrices if (spec.tied_to or spec.name) not in frozen)
    attention = sizes["heads"] * sizes["head_dim"] * sequence_length * (sizes["layers"] - max(0, lowest))
    return forward_flops_per_token(architecture, sequence_length) + 2 * (through + trained) + 8 * max(0, attention)


def _depth(spec: TensorSpec, num_layers: int) -> int:
    """The decoder layer of a tensor, -1 below the first, ``num_layers`` above the last."""
    if spec.layer is not None:
        return spec.layer
    return -1 if spec.role in LOOKUPS else num_layers


def device_peak(stated: float | None) -> Peak | None:
    """The peak of this process's device: the run file's, otherwise by the GPU's name, or None if it is unknown.

    A CPU has no peak here: a matrix product measured 17 to 422 GFLOP/s in four starts on one machine.
    """
    if stated is not None:
        return Peak(stated, "peak_flops of the run file")
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    known = next((peak for part, peak in KNOWN_PEAKS.items() if part in name), None)
    return None if known is None else Peak(known, f"data sheet of {name}, dense bf16")
