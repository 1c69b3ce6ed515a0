"""Which of torch's attention kernels run."""

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

# cuDNN's first, then the others in torch's own order: a mask or a head size that one cannot do goes to the next.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def transformers_attention(attention: Attention) -> str:
    """What transformers calls the implementation."""
    return "eager" if attention == "eager" else "sdpa"


def preferred_kernels(attention: Attention) -> AbstractContextManager[None]:
    """Inside, scaled_dot_product_attention tries cuDNN first if so asked; else torch chooses."""
    return sdpa_kernel(_CUDNN_FIRST, set_priority=True) if attention == "cudnn" else contextlib.nullcontext()


def check_capped_scores(attention: Attention, architecture: Architecture) -> None:
    """Raise ConfigError where scaled_dot_product_attention would not compute the model: it caps no scores (Gemma 2)."""
    kind = getattr(transformers, architecture.family.class_name)
    if attention != "eager" and not kind._supports_sdpa:
        raise ConfigError(
            f"model.attention: {attention}: {architecture.family.model_type} caps its attention scores, which torch's kernels do "
            "not; set eager."
        )


def check_attention(attention: Attention, device: torch.device) -> None:
    """Raise ConfigError for cuDNN's attention where the device has none."""
    if attention == "cudnn" and device.type != "cuda":
        raise ConfigError(
            f"model.attention: cudnn needs a CUDA device and this run is on {device.type!r}; set sdpa, which lets torch choose."
        )
