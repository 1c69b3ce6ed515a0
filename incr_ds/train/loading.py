"""Loads through DeepSpeed with the safe loader, and keeps the run file's settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from incr_ds.checkpoint.torch_file.load import load_pt, load_pt_of

# Classes that DeepSpeed itself pickles into its files, all of them plain data: numbers, names and shapes.
DEEPSPEED_TYPES = (LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, SubparamShape)

# What a dynamic loss scale has become on the way. Everything else in it is a setting.
_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

# Settings that DeepSpeed's loaders copy from an optimizer file into the optimizer.
RUN_FILE_RULES = ("clip_grad", "loss_scaler", "dynamic_loss_scale", "custom_loss_scaler", "external_loss_scale")


def check_files(folder: Path, rank: int, num_ranks: int) -> None:
    """Raise CheckpointError if a .pt file of a tag's folder is damaged or holds more than DeepSpeed writes.

    Each rank checks its share of the files. So all ranks learn of a bad one before DeepSpeed's loader starts, which waits
    for every rank. No tensor is read.
    """
    for path in sorted(folder.glob("*.pt"))[rank::num_ranks]:
        load_pt(path)


@contextmanager
def safe_loading() -> Iterator[None]:
    """A context in which DeepSpeed loads with the safe loader: no code in a file runs, and tensors stay within their records.

    DeepSpeed calls torch.load(weights_only=False) in all of its loaders (its checkpoint engines, ZeRO-3's own files,
    universal folders). So the function itself is replaced while DeepSpeed loads, which covers every call.
    """
    unsafe = torch.load

    def load(f: Any, *_: Any, **__: Any) -> Any:
        return load_pt_of(Path(os.fspath(f)), DEEPSPEED_TYPES)

    torch.load = load
    try:
        yield
    finally:
        torch.load = unsafe


@contextmanager
def own_settings(optimizer: Any) -> Iterator[None]:
    """A context in which DeepSpeed loads into ``optimizer`` (its ZeRO optimizer). Afterwards it restores the settings.

    Tensors and step counts stay as loaded, and so does where a dynamic loss scale stands. Settings are the clipping
    threshold, how the loss scale changes, and every hyperparameter of the parameter groups (learning rate, betas, eps, weight
    decay, and everything else in a group).
    """
    settings = {name: getattr(optimizer, name) for name in RUN_FILE_RULES if hasattr(optimizer, name)}
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    loaded = optimizer.loss_scaler
    for name, value in settings.items():
        setattr(optimizer, name, value)
    _go_on(optimizer.loss_scaler, loaded)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for key in set(group) - {"params"} - set(values):
            del group[key]
        group.update(values)


def _go_on(scaler: Any, loaded: Any) -> None:
    """Let a dynamic loss scale go on where the ``loaded`` one was, within its own bounds."""
    if not (scaler.dynamic and loaded.dynamic):
        return
    for name in _SCALE_STATE:
        setattr(scaler, name, getattr(loaded, name))
    scaler.cur_scale = max(scaler.cur_scale, scaler.min_scale)
    scaler.cur_hysteresis = min(scaler.cur_hysteresis, scaler.delayed_shift)
