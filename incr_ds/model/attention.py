"""Which of torch's attention kernels run."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


def check_attention(attention: Attention, device: torch.device) -> None:
    """Raise ConfigError for cuDNN's attention where the device has none."""
    if attention == "cudnn" and device.type != "cuda":
        raise ConfigError(
            f"model.attention: cudnn needs a CUDA device and this run is on {device.type!r}; set sdpa, which lets torch choose."
        )
