"""Computes the loss and its gradients in one forward pass, and hands them to autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from incr_ds.losses.problem import ENTROPY, Problem, means, prepare
from incr_ds.losses.recompute import RecomputingWalk
from incr_ds.losses.stored import StoredWalk


class FusedLoss(torch.autograd.Function):
    """(hidden [N, Hs], head [V, Hs], problem) -> loss (0-d), parts per token [PARTS, N], valid tokens (0-d)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the loss and, in the same pass, its gradients."""
        prepared = prepare(hidden, head, problem)  # picks the products' dtype from autocast, which then has no effect
        with torch.autocast(hidden.device.type, enabled=False):
            walk = RecomputingWalk(prepared) if problem.recompute else StoredWalk(prepared)
            walk.run()
            loss = problem.objective.total(*means(walk.parts, prepared.tokens)[:ENTROPY])
        # Saved for autograd's own check, which names an input that was changed in place before the backward pass.
        ctx.save_for_backward(hidden, head)
        ctx.gradients, ctx.scale, ctx.lift = walk.gradients(), problem.gradient_scale, prepared.lift
        ctx.mark_non_differentiable(walk.parts, prepared.tokens)
        return loss, walk.parts, prepared.tokens

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients, scaled in place. This works once."""
        if torch.is_grad_enabled():
            raise RuntimeError("distillation_loss has no second derivative; call backward without create_graph=True")
        if ctx.gradients is None:
            raise RuntimeError(
                "distillation_loss: a second backward through the same call; the first one already used its gradients. "
                "Add the losses and call backward once, or compute the loss again"
            )
        hidden, head = ctx.saved_tensors  # runs the check
        hidden_gradient, head_gradient = ctx.gradients
        ctx.gradients = None
        scale = grad_loss if ctx.scale is None else _kept_promise(grad_loss, ctx.scale)
        if ctx.lift is not None:
            scale = scale / ctx.lift
        return _scaled(hidden_gradient, scale, hidden.dtype), _scaled(head_gradient, scale, head.dtype), None


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``gradient`` times ``scale``, in place, and then rounded to ``dtype``."""
    return None if gradient is None else gradient.mul_(scale.to(gradient.dtype)).to(dtype)


def _kept_promise(grad_loss: Tensor, promised: Tensor) -> Tensor:
    """1, or NaN if backward arrives with another scale than the one used for the head's gradient."""
    return torch.where(grad_loss == promised, torch.ones_like(grad_loss), torch.nan)
