"""The loss as its plain formula, against which every backend is tested: full logits, autograd, the whole vocabulary."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from incr_ds.kernels.rows import Divergence, accumulation_dtype
from incr_ds.losses.teachers import HiddenTeacher, SampledTeacher, TopKTeacher, sparse_entries
from incr_ds.losses.terms import SMALLEST_TAIL


def reference_parts(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    teacher: HiddenTeacher | TopKTeacher | SampledTeacher | None,
    *,
    temperature: Tensor,
    label_smoothing: float,
    ignore_index: int,
    divergence: Divergence,
    vocab_size: int,
    softcap: float | None = None,
) -> Tensor:
    """Cross entropy, divergence, squared log-sum-exp and entropy of every token, [4, N]; 0 where it is ignored.

    Computed in fp64 for fp64 inputs, otherwise in fp32; differentiable. Arguments as in ``distillation_loss``.
    """
    dtype = accumulation_dtype(torch.promote_types(hidden.dtype, head.dtype))
    live = labels != ignore_index
    logits = _capped(hidden.to(dtype) @ head[:vocab_size].to(dtype).T, softcap)
    log_p = F.log_softmax(logits, dim=1)
    target = -log_p.gather(1, torch.where(live, labels, 0)[:, None]).squeeze(1)
    ce = (1 - label_smoothing) * target - (label_smoothing * log_p.mean(dim=1) if label_smoothing else 0)
    entropy = -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0).sum(dim=1)
    tempered = F.log_softmax(logits / temperature, dim=1)
    if teacher is None:
        distance = torch.zeros_like(ce)
    elif isinstance(teacher, HiddenTeacher):
        product = teacher.hidden.detach().to(dtype) @ teacher.head[:vocab_size].detach().to(dtype).T
        scores = _capped(product, teacher.softcap)
        distance = _dense(tempered, F.log_softmax(scores / temperature, dim=1), divergence)
    else:
        distance = _sparse(tempered, teacher)
    return torch.where(live, torch.stack([ce, distance, logits.logsumexp(dim=1).square(), entropy]), 0)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _dense(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    if divergence == "forward_kl":
        return _kl(log_q, log_p)
    if divergence == "reverse_kl":
        return _kl(log_p, log_q)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    return torch.where(log_q > -math.inf, log_q.exp() * (log_q - log_p), 0).sum(dim=1)


def _sparse(log_p: Tensor, teacher: TopKTeacher | SampledTeacher) -> Tensor:
    entries = sparse_entries(teacher, log_p.dtype)
    q = entries.probabilities
    chosen = log_p.gather(1, entries.indices.clamp_min(0))
    divergence = torch.where(q > 0, q * (q.clamp_min(1e-300).log() - chosen), 0).sum(dim=1)
    if not entries.bucket:
        return divergence
    present = torch.where(entries.indices >= 0, chosen.exp(), 0)
    rest_q, rest_p = (1 - q.sum(dim=1)).clamp_min(0), (1 - present.sum(dim=1)).clamp_min(SMALLEST_TAIL)
    return divergence + torch.xlogy(rest_q, rest_q) - rest_q * rest_p.log()
