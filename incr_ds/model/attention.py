"""Chooses torch's attention kernels."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel

from incr_ds.arch.architecture import Architecture
from incr_ds.errors import ConfigError

Attention = Literal["sdpa", "eager", "cudnn"]

# cuDNN's first, then torch's own order. If one does not support a mask or a head size, the next is tried.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def transformers_attention(attention: Attention) -> str:
    """The name of the implementation in transformers."""
    return "eager" if attention == "eager" else "sdpa"


def preferred_kernels(attention: Attention) -> AbstractContextManager[None]:
    """A context in which scaled_dot_product_attention tries cuDNN first if requested; otherwise torch chooses."""
    return sdpa_kernel(_CUDNN_FIRST, set_priority=True) if attention == "cudnn" else contextlib.nullcontext()


def check_capped_scores(attention: Attention, architecture: Architecture) -> None:
    """Raise ConfigError if the model caps attention scores (Gemma 2), which scaled_dot_product_attention does not."""
    kind = getattr(transformers, architecture.family.class_name)
    if attention != "eager" and not kind._supports_sdpa:
        raise ConfigError(
            f"model.attention: {attention}: {architecture.family.model_type} caps its attention scores, which torch's kernels do "
            "not support; set eager."
        )


def check_attention(attention: Attention, device: torch.device) -> None:
    """Raise ConfigError if cuDNN's attention is requested on a device without it."""
    if attention == "cudnn" and device.type != "cuda":
        raise ConfigError(
            f"model.attention: cudnn needs a CUDA device, but this run is on {device.type!r}; set sdpa, which lets torch choose."
        )
