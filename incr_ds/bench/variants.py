"""Variants to time: the bare products, this project's backends, and other implementations that are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from incr_ds.errors import KernelError
from incr_ds.kernels.dispatch import row_kernels
from incr_ds.kernels.rows import accumulation_dtype
from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.planner import LossShape
from incr_ds.losses.teachers import TopKTeacher

ALPHA = 0.5
# One forward and backward pass, which returns the bytes of its gradients.
Step = Callable[[], int]


@dataclass(frozen=True)
class BenchProblem:
    """Random tensors of one shape. ``hidden`` and ``head`` need gradients."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    @property
    def taught(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Arguments of the loss with a teacher."""
        return self.hidden, self.head, self.labels, self.teacher_hidden, self.teacher_head

    def backward(self, loss: Tensor) -> int:
        """Compute the gradients, drop them, and return their bytes."""
        gradients = torch.autograd.grad(loss, (self.hidden, self.head), allow_unused=True)
        return sum(gradient.nbytes for gradient in gradients if gradient is not None)


@dataclass(frozen=True)
class Variant:
    """``make`` returns one forward and backward pass over a problem, or raises ImportError if it is not available.

    ``computes`` names the losses. Only variants that compute the same ones are comparable.
    """

    name: str
    kind: Literal["floor", "ours", "torch", "other"]
    computes: str
    make: Callable[[BenchProblem], Step]


def make_problem(shape: LossShape, dtype: torch.dtype, device: torch.device) -> BenchProblem:
    """Hidden states of unit variance and heads that give logits of unit variance."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn((rows, columns), generator=generator, device=device, dtype=dtype).mul_(scale)

    tokens, vocabulary, width, teacher_width = shape.tokens, shape.vocabulary, shape.student_width, shape.teacher_width
    return BenchProblem(
        hidden=normal(tokens, width, 1.0).requires_grad_(),
        head=normal(vocabulary, width, width**-0.5).requires_grad_(),
        labels=torch.randint(0, vocabulary, (tokens,), generator=generator, device=device),
        teacher_hidden=normal(tokens, teacher_width, 1.0),
        teacher_head=normal(vocabulary, teacher_width, teacher_width**-0.5),
    )


def floor(problem: BenchProblem) -> Step:
    """The four matrix products alone, over whole logits, in the inputs' dtype."""
    hidden, head, _, teacher_hidden, teacher_head = (tensor.detach() for tensor in problem.taught)

    def step() -> int:
        logits = hidden @ head.T
        torch.mm(teacher_hidden, teacher_head.T)
        return torch.mm(logits, head).nbytes + torch.mm(logits.T, hidden).nbytes

    return step


def _ours(**settings: Any) -> Callable[[BenchProblem], Step]:
    return lambda problem: lambda: problem.backward(distillation_loss(*problem.taught, alpha=ALPHA, **settings).loss)


def _ours_cuda(problem: BenchProblem) -> Step:
    try:
        row_kernels("cuda", problem.hidden.device, problem.hidden.dtype)
    except (ValueError, KernelError) as error:
        raise ImportError(str(error)) from error
    return _ours(backend="cuda")(problem)


def _ours_buffered(problem: BenchProblem) -> Step:
    """Add the head's gradient to an fp32 buffer, like those of Megatron and DeepSpeed."""
    buffer = torch.zeros_like(problem.head, dtype=accumulation_dtype(problem.head.dtype))
    return lambda: problem.backward(distillation_loss(*problem.taught, alpha=ALPHA, head_gradient=buffer).loss)


def _ours_labels(problem: BenchProblem) -> Step:
    return lambda: problem.backward(distillation_loss(*problem.taught[:3], alpha=0.0).loss)


def _ours_chunked(problem: BenchProblem) -> Step:
    """At most 2048 tokens of student logits and 1024 of the teacher's."""
    stride = LossShape(0, problem.head.shape[0], 0).stride
    budget = (2048 + 1024) * stride * problem.hidden.element_size()
    return _ours(budget_bytes=budget)(problem)


def _ours_top_k(problem: BenchProblem) -> Step:
    tokens, vocabulary = len(problem.labels), problem.head.shape[0]
    count = min(64, vocabulary // 2)
    indices = torch.rand((tokens, vocabulary // 2), device=problem.hidden.device).topk(count, dim=1).indices
    teacher = TopKTeacher(indices, torch.full(indices.shape, 0.9 / count, device=indices.device).log())
    return lambda: problem.backward(distillation_loss(*problem.taught[:3], teacher=teacher, alpha=ALPHA).loss)


def eager_loss(problem: BenchProblem) -> Tensor:
    """The loss over whole logits with an fp32 softmax, as it is usually written."""
    logits = (problem.hidden @ problem.head.T).float()
    log_q = F.log_softmax((problem.teacher_hidden @ problem.teacher_head.T).float(), dim=1)
    kl = F.kl_div(F.log_softmax(logits, dim=1), log_q, log_target=True, reduction="batchmean")
    return (1 - ALPHA) * F.cross_entropy(logits, problem.labels) + ALPHA * kl


def _eager(problem: BenchProblem) -> Step:
    return lambda: problem.backward(eager_loss(problem))


def _compiled(problem: BenchProblem) -> Step:
    if not problem.hidden.is_cuda:
        raise ImportError("timed on CUDA only")
    compiled = torch.compile(eager_loss)
    return lambda: problem.backward(compiled(problem))


def _torch_chunked(problem: BenchProblem) -> Step:
    try:
        from torch.nn import LinearCrossEntropyOptions
    except ImportError as error:
        raise ImportError(f"torch {torch.__version__} has no chunked linear_cross_entropy") from error
    hidden, head, labels = problem.taught[:3]
    options = LinearCrossEntropyOptions()
    return lambda: problem.backward(F.linear_cross_entropy(hidden, head, labels, options=options))


def _liger_distillation(problem: BenchProblem) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(beta=0.0, compiled=problem.hidden.is_cuda)
    hidden, head, labels, teacher_hidden, teacher_head = problem.taught
    return lambda: problem.backward(loss(hidden, head, teacher_hidden, teacher_head, labels))


def _liger_jsd(problem: BenchProblem) -> Step:
    from liger_kernel.transformers import LigerFusedLinearJSD

    if not problem.hidden.is_cuda:
        raise ImportError("its kernels need CUDA")
    loss = LigerFusedLinearJSD(jsd_beta=0.0)
    hidden, head, labels, teacher_hidden, teacher_head = problem.taught
    return lambda: problem.backward(loss(hidden, head, teacher_hidden, teacher_head, labels))


def _trl(problem: BenchProblem) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    if not problem.hidden.is_cuda:
        raise ImportError("its kernels need CUDA")
    hidden, head, _, teacher_hidden, teacher_head = problem.taught

    def step() -> int:
        divergence, _ = ChunkedDivergenceFunction.apply(hidden, head, None, teacher_hidden, teacher_head, None, 0.0)
        return problem.backward(divergence.mean())

    return step


VARIANTS = (
    Variant("products only", "floor", "nothing", floor),
    Variant("incr_ds", "ours", "CE + KL", _ours()),
    Variant("incr_ds, 2048-token chunks", "ours", "CE + KL", _ours_chunked),
    Variant("incr_ds, into an fp32 buffer", "ours", "CE + KL", _ours_buffered),
    Variant("incr_ds, recompute", "ours", "CE + KL", _ours(backend="recompute")),
    Variant("incr_ds, torch rows", "ours", "CE + KL", _ours(backend="torch")),
    Variant("incr_ds, CUDA rows", "ours", "CE + KL", _ours_cuda),
    Variant("incr_ds, JSD", "ours", "CE + JSD", _ours(divergence="jsd")),
    Variant("incr_ds, top 64", "ours", "CE + KL of 64 entries", _ours_top_k),
    Variant("incr_ds, no teacher", "ours", "CE", _ours_labels),
    Variant("eager", "torch", "CE + KL", _eager),
    Variant("torch.compile", "torch", "CE + KL", _compiled),
    Variant("torch linear_cross_entropy", "torch", "CE", _torch_chunked),
    Variant("Liger distillation", "other", "CE + KL", _liger_distillation),
    Variant("Liger fused linear JSD", "other", "KL", _liger_jsd),
    Variant("TRL chunked divergence", "other", "KL", _trl),
)
