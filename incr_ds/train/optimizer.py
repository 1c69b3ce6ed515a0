"""AdamW as torch or DeepSpeed implements it, and the one difference between their states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError


def build_adamw(groups: Sequence[dict[str, Any]], run: RunSettings, device: torch.device) -> torch.optim.Optimizer:
    """Build AdamW over parameter ``groups`` with the run's settings.

    DeepSpeed compiles its FusedAdam on first use, with optimizer.offload its CPUAdam. Raises ConfigError with the reason if
    that fails.
    """
    settings = run.optimizer
    options: dict[str, Any] = {"lr": run.schedule.learning_rate, "betas": settings.betas, "eps": settings.eps}
    if settings.implementation == "torch":
        return torch.optim.AdamW(groups, **options, fused=device.type == "cuda")
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    name = "FusedAdam" if settings.offload == "none" else "DeepSpeedCPUAdam"
    try:
        compiled: torch.optim.Optimizer = (
            FusedAdam(groups, **options, adam_w_mode=True)
            if settings.offload == "none"
            else DeepSpeedCPUAdam(groups, **options, adamw_mode=True)
        )
    # Many kinds of errors can come from ninja, the compiler and the loader.
    except Exception as error:
        raise ConfigError(
            f"optimizer.implementation: deepspeed: {name} could not be built ({type(error).__name__}: {error}). See "
            "DeepSpeed's ds_report for its compiler, or set torch."
        ) from error
    return compiled


def adapt_steps(optimizer: torch.optim.Optimizer, run: RunSettings) -> None:
    """Convert the loaded step counts of ``optimizer`` to the type that it needs: a tensor for torch, an int for DeepSpeed's."""
    on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    for state in optimizer.state.values():
        if "step" not in state:
            continue
        if run.optimizer.implementation == "deepspeed":
            state["step"] = int(state["step"])
        else:
            where = state["exp_avg"].device if on_device else "cpu"
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=where)
