"""Runs micro-batches through DeepSpeed: in a plain engine's loop, or by the pipeline's schedule."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from incr_ds.data.targets import Targets
from incr_ds.kernels.rows import Divergence
from incr_ds.losses.distillation import DistillationLoss
from incr_ds.model.sequence_parallel import SequenceRanks
from incr_ds.model.teacher import Teacher

# input_ids [B, S] and their targets
Batch = tuple[Tensor, Targets]
# alpha, temperature and divergence with which the loss computes the distance to the teacher, besides the cross entropy
DISTANCE: tuple[float, float, Divergence] = (1.0, 1.0, "forward_kl")


def on_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a micro-batch to ``device``."""
    input_ids, targets = batch
    if isinstance(targets, Tensor):
        return input_ids.to(device), targets.to(device)
    labels, indices, log_probs = targets
    return input_ids.to(device), (labels.to(device), indices.to(device), log_probs.to(device))


class LossRecord:
    """Sums over the micro-batches of one pass: loss parts, and cross entropy and divergence weighted by tokens."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def add(self, parts: DistillationLoss) -> None:
        """Record one micro-batch."""
        loss, ce, divergence, tokens = (
            part.detach().double() for part in (parts.loss, parts.ce, parts.divergence, parts.tokens)
        )
        self._parts.append(torch.stack([loss, ce, divergence, ce * tokens, divergence * tokens, tokens]))

    def take(self, device: torch.device) -> Tensor:
        """Return [loss, ce, divergence] averaged over micro-batches, then ce * tokens, divergence * tokens
        and tokens summed; then clear.

        Zeros on a rank that computes no loss.
        """
        if not self._parts:
            return torch.zeros(6, dtype=torch.float64, device=device)
        stacked = torch.stack(self._parts)
        self._parts = []
        # stacked: [micro-batches, 6]
        return torch.cat([stacked[:, :3].mean(dim=0), stacked[:, 3:].sum(dim=0)])


def as_share(parts: DistillationLoss, ranks: SequenceRanks) -> DistillationLoss:
    """Weight the means over this rank's tokens, so that their average over ``ranks`` is the mean over the tokens of all."""
    total = parts.tokens.clone()
    dist.all_reduce(total, group=ranks.group)
    weight = parts.tokens * ranks.size / total.clamp_min(1)
    return parts._replace(loss=parts.loss * weight, ce=parts.ce * weight, divergence=parts.divergence * weight)


class BatchRunner(Protocol):
    """Consumes exactly the requested number of micro-batches, and records their losses."""

    def train(self, batches: Iterator[Batch], alpha: float, temperature: float) -> None:
        """Take one optimizer step over the engine's accumulation steps."""
        ...

    def evaluate(self, batches: Iterator[Batch], count: int, *, taught: bool) -> None:
        """Compute the cross entropy of ``count`` micro-batches without gradients.

        With ``taught`` also KL(teacher || student) at temperature 1, whatever divergence the run trains with.
        """
        ...

    def forget_teacher(self) -> bool:
        """Free the teacher's memory. Returns whether there was a teacher."""
        ...


class PlainRunner:
    """Runs an engine without a pipeline."""

    def __init__(
        self, engine: DeepSpeedEngine, teacher: Teacher | None, record: LossRecord, shared: SequenceRanks
    ) -> None:
        self._engine, self._teacher, self._record, self._shared = engine, teacher, record, shared

    def train(self, batches: Iterator[Batch], alpha: float, temperature: float) -> None:
        """Take one optimizer step."""
        self._engine.train()
        for _ in range(self._engine.gradient_accumulation_steps()):
            input_ids, targets = self._next(batches)
            taught = self._taught(input_ids) if alpha > 0 else (None, None)
            parts = self._engine(input_ids, targets, *taught, alpha, temperature)
            if self._shared.size > 1:
                parts = as_share(parts, self._shared)
            self._record.add(parts)
            self._engine.backward(parts[0])
            self._engine.step()

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch], count: int, *, taught: bool) -> None:
        """Evaluate ``count`` micro-batches."""
        self._engine.eval()
        for _ in range(count):
            input_ids, targets = self._next(batches)
            extra = (*self._taught(input_ids), *DISTANCE) if taught else ()
            self._record.add(self._engine(input_ids, targets, *extra))
        self._engine.train()

    def forget_teacher(self) -> bool:
        """Free the teacher's memory. Returns whether there was a teacher."""
        had, self._teacher = self._teacher is not None, None
        return had

    def _taught(self, input_ids: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The teacher's hidden states and head. None if there is none: it may come with the targets."""
        return (None, None) if self._teacher is None else (self._teacher.forward(input_ids), self._teacher.head)

    def _next(self, batches: Iterator[Batch]) -> Batch:
        return on_device(next(batches), self._engine.device)


class PipelineRunner:
    """Runs DeepSpeed's pipeline engine. Its module records the losses on the last stage."""

    def __init__(self, engine: PipelineEngine) -> None:
        self._engine = engine

    def train(self, batches: Iterator[Batch], alpha: float, temperature: float) -> None:
        """Take one optimizer step."""
        module = self._engine.module
        self._prepare(alpha, temperature, teaching=module.has_teacher and alpha > 0)
        self._engine.train_batch(batches)

    def evaluate(self, batches: Iterator[Batch], count: int, *, taught: bool) -> None:
        """Evaluate ``count`` micro-batches."""
        self._prepare(*(DISTANCE if taught else (0.0, 1.0)), teaching=taught)
        # Its average is not used, since ours weights by tokens.
        self._engine.eval_batch(batches, bcast_loss=False, num_micro_batches=count)
        self._engine.reset_activation_shape()

    def forget_teacher(self) -> bool:
        """Free the memory of the teacher's part on this stage. Returns whether there was one."""
        had: bool = self._engine.module.has_teacher
        self._engine.module.forget_teacher()
        return had

    def _prepare(
        self, alpha: float, temperature: float, divergence: Divergence | None = None, *, teaching: bool
    ) -> None:
        module = self._engine.module
        if module.teaching != teaching:
            # From now on the stages exchange a different number of tensors.
            self._engine.reset_activation_shape()
        module.alpha, module.temperature, module.divergence = alpha, temperature, divergence
        module.teaching = teaching
