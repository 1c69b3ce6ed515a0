"""Chooses the row kernels: the best for the device, or the requested ones, or an error that explains why not."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch

from incr_ds.kernels.cuda_library import CAPABILITY, find_nvcc, library_path
from incr_ds.kernels.cuda_rows import cuda_rows
from incr_ds.kernels.rows import RowKernels
from incr_ds.kernels.torch_rows import TorchRows

Backend = Literal["auto", "reference", "torch", "triton", "cuda", "recompute"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "torch", "triton", "cuda", "recompute")

_log = logging.getLogger(__name__)


def row_kernels(backend: Backend, device: torch.device, dtype: torch.dtype) -> RowKernels:
    """The row kernels of ``backend`` for logits on ``device`` whose products take operands of ``dtype``.

    ``auto`` picks Triton on a CUDA device that supports it, otherwise torch, and logs the choice once. So does
    ``recompute``, which determines the order in which logits are computed and not the row kernels. Raises ValueError for
    an unknown backend or one that cannot run here, with the reason, and KernelError if nvcc fails.
    """
    if backend in ("auto", "recompute"):
        return TorchRows() if dtype == torch.float64 else _automatic(device.type)
    if backend == "torch":
        return TorchRows()
    if backend not in ("triton", "cuda"):
        raise ValueError(f"backend {backend!r} is unknown; the backends are {', '.join(BACKENDS)}")
    obstacle = _triton_obstacle(device.type, dtype) if backend == "triton" else _cuda_obstacle(device, dtype)
    if obstacle is not None:
        raise ValueError(f"backend {backend!r} cannot run: {obstacle}. Use backend='torch' or 'auto'")
    return _triton_rows() if backend == "triton" else cuda_rows()


@functools.cache
def _automatic(device: str) -> RowKernels:
    """Choose once per type of device, and log the choice."""
    # Never the cuda backend: no measurement shows yet when it is faster.
    reason = "the device is not CUDA" if device != "cuda" else _triton_obstacle(device, torch.float32)
    kernels = TorchRows() if reason is not None else _triton_rows()
    _log.info("distillation loss on %s: row kernels %s%s", device, kernels.name, f" ({reason})" if reason else "")
    return kernels


def _triton_obstacle(device: str, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "its kernels compute in fp32, but the tensors are float64"
    try:
        from incr_ds.kernels import triton_rows
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if device == "cuda":
        return None
    if not triton_rows.INTERPRETED:
        return f"the tensors are on {device!r}, not on a CUDA device (or set TRITON_INTERPRET=1 before the import)"
    if dtype == torch.bfloat16:
        return "Triton's interpreter rounds bfloat16 wrongly"
    return None


def _cuda_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype == torch.float64:
        return "its kernels compute in fp32, but the tensors are float64"
    if device.type != "cuda":
        return f"the tensors are on {device.type!r}, not on a CUDA device"
    if not library_path().exists() and find_nvcc() is None:
        return f"its library {library_path()} is not built, and there is no nvcc in CUDA_HOME or on PATH to build it"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"its kernels are built for compute capability {CAPABILITY}, this device's is {capability}"
    return None


def _triton_rows() -> RowKernels:
    from incr_ds.kernels.triton_rows import TritonRows

    return TritonRows()
