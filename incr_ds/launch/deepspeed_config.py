"""Builds DeepSpeed's config from the run file and the JSON file that it names."""

from __future__ import annotations

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from incr_ds.config.deepspeed_file import read_deepspeed_file
from incr_ds.config.optimizer import LossScalingSettings
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError

# DeepSpeed's sections that the run file replaces, and the run-file section to write instead.
_OWNED_SECTIONS = {
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "fp16": "precision and loss_scaling",
    "amp": "precision",
}


def deepspeed_config(run: RunSettings) -> dict[str, Any]:
    """Build the config for deepspeed.initialize.

    Raises ConfigError that lists every problem: a key that DeepSpeed does not know, a value of the wrong type, a value that
    contradicts the run file, or a setting that belongs in the run file; and for a ZeRO stage that cannot be trained.
    """
    _check_zero_stage(run)
    user = {} if run.deepspeed is None else read_deepspeed_file(Path(run.deepspeed))
    problems = [
        f"  {section}: state it in the run file's section {owner!r} instead, and remove it here"
        for section, owner in _OWNED_SECTIONS.items()
        if section in user
    ]
    if user.get("data_types", {}).get("grad_accum_dtype") not in (None, _dtype_name(run)):
        problems.append(
            f"  data_types.grad_accum_dtype: {user['data_types']['grad_accum_dtype']!r} makes DeepSpeed switch to an "
            f"optimizer that keeps its state in another format; remove it, or set {_dtype_name(run)!r}"
        )
    config: dict[str, Any] = deepcopy(dict(user))
    for path, value, origin in _derived(run):
        problems += _state(config, path, value, origin)
    offload = config["zero_optimization"].get("offload_optimizer") or {}
    if len({count > 1 for count in run.accumulations}) > 1 and offload.get("device", "none") != "none":
        problems.append(
            "  optimizer.offload (zero_optimization.offload_optimizer): does not go with batch.ramp from one micro-batch per "
            "step to several, between which DeepSpeed cannot change with an offloaded optimizer; lower "
            "batch.micro_batch_size, or remove one"
        )
    if run.optimizer.name == "muon" and offload.get("device", "none") != "none":
        problems.append("  zero_optimization.offload_optimizer: does not go with optimizer.name: muon here; remove it")
    if problems:
        raise ConfigError("\n".join([f"{run.deepspeed or 'the run file'}: {len(problems)} problem(s)", *problems]))
    _fill_defaults(config)
    return config


def _derived(run: RunSettings) -> list[tuple[tuple[str, ...], Any, str]]:
    """Yield (path in DeepSpeed's config, value, where the run file states it)."""
    batch, first = run.batch, run.schedule.start_step
    # DeepSpeed does not know that ranks share samples: to it, every data-parallel rank has its own.
    seen = batch.size_at(first) * batch.sequence_parallel
    origin = "batch.global_batch_size" + (" x sequence_parallel" if batch.sequence_parallel > 1 else "")
    return [
        (("train_batch_size",), seen, origin),
        (("train_micro_batch_size_per_gpu",), batch.micro_batch_size, "batch.micro_batch_size"),
        (("gradient_accumulation_steps",), run.accumulation_at(first), "batch and layout.data_parallel"),
        (("gradient_clipping",), run.optimizer.gradient_clipping, "optimizer.gradient_clipping"),
        (("bf16", "enabled"), run.precision == "bf16", f"precision: {run.precision}"),
        *_offload(run),
        *((("fp16", key), value, "loss_scaling") for key, value in _fp16(run).items()),
        (("zero_optimization", "stage"), run.layout.zero_stage, "layout.zero_stage"),
    ]


def _offload(run: RunSettings) -> list[tuple[tuple[str, ...], Any, str]]:
    if run.optimizer.offload == "none":
        return []
    return [(("zero_optimization", "offload_optimizer", "device"), run.optimizer.offload, "optimizer.offload")]


def _fp16(run: RunSettings) -> dict[str, Any]:
    """DeepSpeed's section fp16, for a run in fp16."""
    if run.precision != "fp16":
        return {}
    scaling = run.loss_scaling or LossScalingSettings()
    return {
        "enabled": True,
        "loss_scale": scaling.scale or 0,  # 0 stands for a dynamic one
        "initial_scale_power": scaling.initial_power,
        "loss_scale_window": scaling.window,
        "hysteresis": scaling.hysteresis,
        "min_loss_scale": scaling.min_scale,
    }


def _state(config: dict[str, Any], path: tuple[str, ...], value: Any, origin: str) -> list[str]:
    """Set ``path`` to ``value``, and return the problem if the JSON has another value there."""
    section = config
    for name in path[:-1]:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            return [f"  {name}: expected a section of DeepSpeed's config, found {section!r}"]
    found = section.get(path[-1], value)
    section[path[-1]] = value
    if found == value:
        return []
    return [f"  {'.'.join(path)}: {found!r}, but the run file derives {value!r} from {origin}; remove it here"]


def _fill_defaults(config: dict[str, Any]) -> None:
    # This project reports progress itself.
    config.setdefault("steps_per_print", sys.maxsize)
    # DeepSpeed can slice the activations between stages over tensor ranks, but not the teacher's, which are sent along.
    config.setdefault("pipeline", {}).setdefault("pipe_partitioned", False)
    config["pipeline"].setdefault("grad_partitioned", False)
    # Optimizer offload works with the AdamW that is passed; DeepSpeed's own would need a compiler.
    config.setdefault("zero_force_ds_cpu_optimizer", False)


def _dtype_name(run: RunSettings) -> str:
    return run.precision


def _check_zero_stage(run: RunSettings) -> None:
    if run.layout.zero_stage == 0:
        raise ConfigError(
            "layout.zero_stage 0: training needs 1, 2 or 3, because DeepSpeed's unpartitioned optimizer reports no "
            "gradient norm and does not skip steps with non-finite gradients. zero_stage 1 computes the same."
        )
