"""Liger's fused kernels for RMSNorm, SwiGLU and rotary positions inside transformers' layers (extra ``liger``)."""

from __future__ import annotations

import inspect

import torch

from incr_ds.errors import ConfigError

KERNELS = ("rope", "rms_norm", "swiglu", "geglu")
WHERE = "model.layer_kernels: liger"


def use_liger(model_type: str, device: torch.device) -> None:
    """Make transformers build the layers of ``model_type`` with Liger's modules, which have the same parameter names.

    Liger replaces the classes in transformers' module, so the choice holds for the whole process. Raises ConfigError if the
    package is not installed, does not support the family, or ``device`` is not CUDA.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as APPLY
    except ImportError as error:
        raise ConfigError(
            f"{WHERE}: liger-kernel cannot be imported ({error}); pip install 'incr_ds[liger]', or set transformers."
        ) from error
    if model_type not in APPLY:
        raise ConfigError(
            f"{WHERE}: liger-kernel does not support {model_type}; it supports {', '.join(sorted(APPLY))}."
        )
    if device.type != "cuda":
        raise ConfigError(
            f"{WHERE}: its kernels need a CUDA device, but this run is on {device.type!r}; set transformers."
        )
    apply_liger(model_type)


def apply_liger(model_type: str) -> None:
    """Replace the classes. The loss stays this project's own."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    # The parameters of a family's function show which kernels it has.
    kernels = [name for name in KERNELS if name in inspect.signature(apply).parameters]
    apply(**dict.fromkeys(kernels, True), cross_entropy=False, fused_linear_cross_entropy=False)
