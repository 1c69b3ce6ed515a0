"""Decisions that all ranks take together. Either all ranks call a function of this module, or none does.

Without a process group there is a single rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from incr_ds.errors import CheckpointError, IncrError

Result = TypeVar("Result")


def is_first_rank() -> bool:
    """Whether this process is rank 0, which prints and publishes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def any_rank(condition: bool) -> bool:
    """Whether ``condition`` holds on any rank."""
    if not dist.is_initialized():
        return condition
    device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
    flag = torch.tensor(int(condition), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item())


def together() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def on_rank_zero(work: Callable[[], Result]) -> Result:
    """Run ``work`` on rank 0 and return its result on all ranks. An error is raised on all ranks, too."""
    if not dist.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: Result = outcome[0]
    return result


def on_every_rank(work: Callable[[], Result], what: str, remedy: str) -> Result:
    """Run ``work`` on all ranks and return its result. If it fails on any rank, raise CheckpointError on all.

    The message consists of ``what``, the failed ranks with their reasons, and the sentence ``remedy``.
    """
    reason, result = None, None
    try:
        result = work()
    except IncrError as error:
        reason = str(error).removesuffix(".")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    reasons = [reason]
    if dist.is_initialized():
        reasons = [None] * dist.get_world_size()
        dist.all_gather_object(reasons, reason)
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text is not None]
    if failed:
        raise CheckpointError(f"{what} on {'; '.join(failed)}. {remedy}")
    return cast(Result, result)
