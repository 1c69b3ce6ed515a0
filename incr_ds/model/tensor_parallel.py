"""Cuts a freshly built layer over the tensor ranks with DeepSpeed's layers, as the placement declares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from deepspeed.module_inject.layers import (
    ColumnParallel,
    LinearAllreduce,
    LinearLayer,
    RowParallel,
    VocabParallelEmbedding,
    set_autotp_mode,
)
from torch import Tensor, nn

from incr_ds.arch.tensors import TensorSpec
from incr_ds.errors import LayoutError
from incr_ds.sharding.placement import sharded_dimension


@dataclass(frozen=True)
class TensorRanks:
    """This rank's position among the ranks that share one model. ``group`` is None for a single rank."""

    group: dist.ProcessGroup | None
    rank: int
    size: int


def cut_linears(module: nn.Module, specs: Mapping[str, TensorSpec], ranks: TensorRanks) -> None:
    """Replace, in place, the linear and embedding layers inside ``module`` that the placement cuts.

    ``specs`` declares the module's parameters by their names inside ``module``. DeepSpeed's layers slice the weight that
    they are given, so ``module`` must be built for this call only.
    """
    if ranks.group is None:
        return
    # Otherwise DeepSpeed's layers are built for inference, without gradients.
    set_autotp_mode(training=True)
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.Linear | nn.Embedding):
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, _cut(child, specs[f"{name}.weight"], ranks))


def _cut(layer: nn.Linear | nn.Embedding, spec: TensorSpec, ranks: TensorRanks) -> nn.Module:
    dimension = sharded_dimension(spec)
    if dimension is None:
        return layer
    kinds = {(nn.Linear, 0): LinearLayer, (nn.Linear, 1): LinearAllreduce, (nn.Embedding, 0): VocabParallelEmbedding}
    kind = kinds.get((type(layer), dimension))
    if kind is None:
        raise LayoutError(f"{spec.name}: a {type(layer).__name__} cut along dimension {dimension} is not supported")
    cut: nn.Module = kind(layer, ranks.group)
    return cut


def cut_experts(experts: nn.Module, ranks: TensorRanks) -> None:
    """Sum what the ranks' shares of all experts compute, and the gradients of what they read.

    ``experts`` is transformers' module: (hidden [N, H], chosen experts [N, k], their shares [N, k]) -> [N, H].
    """
    if ranks.group is None:
        return
    for parameter in experts.parameters():
        # DeepSpeed's gradient norm reads this attribute, to count a cut tensor on every tensor rank.
        vars(parameter)["tensor_model_parallel"] = True

    def read(_: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, chosen, shares = inputs
        return ColumnParallel.apply(ranks.group, hidden), chosen, ColumnParallel.apply(ranks.group, shares)

    def write(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        summed: Tensor = RowParallel.apply(ranks.group, output, False)
        return summed

    experts.register_forward_pre_hook(read)
    experts.register_forward_hook(write)


def sum_partial_gradients(module: nn.Module, specs: Mapping[str, TensorSpec], ranks: TensorRanks) -> None:
    """Sum the gradients of whole tensors inside a cut region over the tensor ranks.

    A norm over each head (role ``inner_norm``) is the same tensor on every rank, but every rank applies it only to its
    own heads.
    """
    if ranks.group is None:
        return
    for name, parameter in module.named_parameters():
        if specs[name].role == "inner_norm" and parameter.requires_grad:
            parameter.register_hook(lambda gradient: _summed(gradient, ranks.group))


def _summed(gradient: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total
