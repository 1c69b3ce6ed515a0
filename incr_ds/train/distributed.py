"""This process among the others: joining the world, its device, quiet logs."""

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


def initialize_distributed(layout: ParallelLayout) -> torch.device:
    """Join the processes that a launcher started (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Returns this process's device. Raises ConfigError unless there are exactly ``layout.world_size`` processes.
    """
    check_world_size(layout)
    _quiet()
    device = _device()
    if not dist.is_initialized():
        deepspeed.init_distributed(verbose=False)
    return device


def check_world_size(layout: ParallelLayout) -> None:
    """Raise ConfigError unless the launcher started ``layout.world_size`` processes."""
    started = os.environ.get("WORLD_SIZE")
    if started is None:
        raise ConfigError(
            "no WORLD_SIZE in the environment: start training with a launcher, for instance "
            f"deepspeed --num_gpus {layout.world_size} launchers/pretrain.py --config RUN.yaml"
        )
    if int(started) != layout.world_size:
        raise ConfigError(
            f"layout: tensor_parallel {layout.tensor_parallel} x pipeline_parallel {layout.pipeline_parallel} x "
            f"data_parallel {layout.data_parallel} needs {layout.world_size} processes, but {started} were started; "
            "start that many, or change data_parallel"
        )


def _quiet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed 0.19 calls collectives that torch 2.13 is renaming, in every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # Its pipeline exchanges activations by a broadcast that autograd sees but need not follow; gradients are tested.
    warnings.filterwarnings("ignore", category=UserWarning, message=r"c10d::broadcast_: an autograd kernel")


def _device() -> torch.device:
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Its shared-memory collectives need a C++ compiler at start-up; gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(local_rank))
