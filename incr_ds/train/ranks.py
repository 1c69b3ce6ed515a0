"""Decisions that all ranks take together. Either all ranks call a function of this module, or none does.

Without a process group there is a single rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from incr_ds.errors import CheckpointError, IncrError
from incr_ds.offline.process_group import SINGLE_PROCESS, ProcessGroup, SingleProcess, agree, on_first

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


@dataclass(frozen=True)
class _Ranks(SingleProcess):
    """The ranks of torch.distributed's default group. A launcher ends all of them when one ends."""

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def all_ranks() -> ProcessGroup:
    """The ranks of this run."""
    return _Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else SINGLE_PROCESS


def on_rank_zero(work: Callable[[], Result]) -> Result:
    """Run ``work`` on rank 0 and return its result on all ranks. An error is raised on all ranks, too."""
    return on_first(all_ranks(), work)


def on_every_rank(work: Callable[[], Result], what: str, remedy: str) -> Result:
    """Run ``work`` on all ranks and return its result. If it fails on any rank, raise CheckpointError on all.

    The message names the first failed rank and consists of ``what``, the reason, and the sentence ``remedy``.
    """

    def explained() -> Result:
        try:
            return work()
        except IncrError as error:
            raise CheckpointError(f"{what}: {str(error).removesuffix('.')}. {remedy}") from error
        except Exception as error:
            raise CheckpointError(f"{what}: {type(error).__name__}: {error}. {remedy}") from error

    return agree(all_ranks(), explained)
