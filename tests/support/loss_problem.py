"""A small loss problem with a different size on every axis, and how two results are compared."""

from dataclasses import dataclass

import torch

from incr_ds.losses.distillation import distillation_loss

N, V, HS, HT = 11, 101, 24, 17
IGNORED = (5, 9)


@dataclass(frozen=True)
class LossProblem:
    """Tensors of one call; ``hidden`` and ``head`` want gradients."""

    hidden: torch.Tensor
    head: torch.Tensor
    labels: torch.Tensor
    teacher_hidden: torch.Tensor
    teacher_head: torch.Tensor

    def to(self, dtype):
        """The same numbers, rounded to ``dtype``, as fresh leaves."""
        rounded = [tensor.detach().to(dtype).clone() for tensor in self.floats]
        return LossProblem(rounded[0].requires_grad_(), rounded[1].requires_grad_(), self.labels, *rounded[2:])

    @property
    def floats(self):
        return self.hidden, self.head, self.teacher_hidden, self.teacher_head

    @property
    def tensors(self):
        return self.hidden, self.head, self.labels, self.teacher_hidden, self.teacher_head


def make_problem(dtype=torch.float64, seed=0, ignored=IGNORED, scale=1.0, tokens=N):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, HS), (V, HS), (tokens, HT), (V, HT))
    hidden, head, teacher_hidden, teacher_head = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes
    )
    labels = torch.randint(0, V, (tokens,), generator=generator)
    labels[list(ignored)] = -100
    return LossProblem(scale * hidden, head, labels, teacher_hidden, teacher_head).to(dtype)


def outcome(problem, **settings):
    """(loss, ce, divergence, z, entropy, gradient of hidden, gradient of head) in fp64."""
    taught = () if "teacher" in settings else (problem.teacher_hidden, problem.teacher_head)
    result = distillation_loss(problem.hidden, problem.head, problem.labels, *taught, **settings)
    gradients = torch.autograd.grad(result.loss, (problem.hidden, problem.head))
    return [value.detach().double() for value in (*result[:5], *gradients)]


def relative_errors(found, expected):
    """Relative L2 error of each tensor; 0 / 0 is 0."""
    return [((a - b).norm() / b.norm().clamp_min(1e-300)).item() for a, b in zip(found, expected, strict=True)]
