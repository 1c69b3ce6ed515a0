"""AdamW as torch or DeepSpeed implements it, DeepSpeed's Muon beside it, and the one difference between their states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from incr_ds.config.optimizer import MuonSettings, OptimizerSettings
from incr_ds.config.training import RunSettings
from incr_ds.data.importing import without_compiler
from incr_ds.errors import ConfigError


def build_optimizer(groups: Sequence[dict[str, Any]], run: RunSettings, device: torch.device) -> torch.optim.Optimizer:
    """Build the run's optimizer over parameter ``groups``, which say ``use_muon`` in a run with Muon.

    DeepSpeed compiles its FusedAdam on first use, with optimizer.offload its CPUAdam. Raises ConfigError with the reason if
    that fails.
    """
    return _with_muon(groups, run, device) if run.optimizer.name == "muon" else build_adamw(groups, run, device)


def rate_ratio(group: Mapping[str, Any], settings: OptimizerSettings) -> float:
    """The factor of the schedule's rate that is the optimizer's own, for a parameter group."""
    return (settings.muon or MuonSettings()).learning_rate_ratio if group.get("use_muon") else 1.0


def _with_muon(groups: Sequence[dict[str, Any]], run: RunSettings, device: torch.device) -> torch.optim.Optimizer:
    """DeepSpeed's Muon, which lets AdamW train the groups that it leaves out. ZeRO tells its matrices by an attribute."""
    with without_compiler():
        from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    momentum = (run.optimizer.muon or MuonSettings()).momentum
    own = []
    for group in groups:
        for parameter in group["params"]:
            parameter.use_muon = group["use_muon"]
        kept = {key: group[key] for key in group if key != "eps"} | {"momentum": momentum}
        own.append(kept if group["use_muon"] else {**group, "betas": run.optimizer.betas})

    def adamw(rest: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return build_adamw(rest, run, device)

    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(own, adam_optimizer=adamw)
    return optimizer


def build_adamw(groups: Sequence[dict[str, Any]], run: RunSettings, device: torch.device) -> torch.optim.Optimizer:
    """Build AdamW alone. Raises ConfigError like ``build_optimizer``."""
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
    defaults = getattr(optimizer, "aux_optimizer", optimizer).defaults  # beside Muon, AdamW's
    on_device = defaults.get("fused") or defaults.get("capturable")
    for state in optimizer.state.values():
        if "step" not in state:
            continue
        if run.optimizer.implementation == "deepspeed":
            state["step"] = int(state["step"])
        else:
            where = state["exp_avg"].device if on_device else "cpu"
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=where)
