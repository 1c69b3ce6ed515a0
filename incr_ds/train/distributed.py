"""Joins this process to the others of a run, chooses its device and quiets logs."""

from __future__ import annotations

import logging
import os
import warnings

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError
from incr_ds.launch.preflight import check_world_size


def initialize_distributed(layout: ParallelLayout) -> torch.device:
    """Join the processes that a launcher started (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Returns this process's device. Raises ConfigError unless there are exactly ``layout.world_size`` processes, or if they
    cannot connect.
    """
    check_world_size(layout)
    _quiet()
    device = _device()
    if not dist.is_initialized():
        try:
            deepspeed.init_distributed(verbose=False)
        except dist.DistNetworkError as error:
            raise ConfigError(_cannot_meet(str(error))) from error
    return device


def end_processes() -> None:
    """Leave the other processes. All of them call this when they are done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _cannot_meet(reason: str) -> str:
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if "EADDRINUSE" in reason or "address already in use" in reason:
        return (
            f"{where}: another process, perhaps another run, uses this port; give each run its own: deepspeed --master_port PORT "
            "(Slurm: MASTER_PORT)."
        )
    return f"the processes could not connect at {where}: {reason.splitlines()[0]}"


def _quiet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives that torch 2.13 is renaming, in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Its pipeline exchanges activations by a broadcast through which autograd need not differentiate; gradients are tested.
    warnings.filterwarnings("ignore", category=UserWarning, message=r"c10d::broadcast_: an autograd kernel")


def _device() -> torch.device:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Its shared-memory collectives need a C++ compiler at start-up; gloo works without one.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(local_rank))
