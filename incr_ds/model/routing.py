"""The router loss of a mixture of experts, and how evenly its tokens are spread.

The loss of one layer is that of Switch Transformers (Fedus et al. 2021, arXiv 2101.03961, equation 4) for k experts per token:
E sum_i f_i P_i, where f_i is the share of tokens that choose expert i and P_i the mean of its probability. It is k if
tokens are spread evenly. The loss of the model is the mean over its layers, so it does not depend on pipeline stages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from incr_ds.arch.architecture import Architecture


class Router:
    """Watches the router of one decoder layer. Not an nn.Module, so that the layer's parameters keep their names."""

    def __init__(self, gate: nn.Module) -> None:
        gate.register_forward_hook(self._keep)
        self._outputs: tuple[Tensor, Tensor, Tensor] | None = None

    def take(self) -> tuple[Tensor, Tensor]:
        """The loss (0-d, fp32) of the last forward pass, and how many tokens chose each expert [E]. Once per pass."""
        assert self._outputs is not None
        logits, _, chosen = self._outputs  # [N, E], shares [N, k], [N, k]
        self._outputs = None
        num_experts = logits.shape[-1]
        counts = torch.bincount(chosen.flatten(), minlength=num_experts).to(torch.float32)
        probabilities = logits.float().softmax(dim=-1).mean(dim=0)
        return num_experts * (counts / len(logits) * probabilities).sum(), counts

    def _keep(self, gate: nn.Module, _: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        if gate.training:  # nobody takes those of an evaluation, or of a teacher
            self._outputs = outputs


class Routing:
    """The router losses of the layers that a rank runs: their sum over one forward pass, and a record of a step.

    Shared by the layers of a model, as their positions are. A dense model has none (``is_mixture`` is False).
    """

    def __init__(self, architecture: Architecture) -> None:
        self._layers, self._experts = architecture.num_layers, architecture.sizes.get("experts", 0)
        self._sum: Tensor | None = None
        self._recorded: list[tuple[int, Tensor, Tensor]] = []

    @property
    def is_mixture(self) -> bool:
        """Whether the model has routers."""
        return self._experts > 0

    def add(self, layer: int, loss: Tensor, counts: Tensor) -> None:
        """Add what ``Router.take`` gave for ``layer``."""
        self._sum = loss if self._sum is None else self._sum + loss
        self._recorded.append((layer, loss.detach(), counts))

    def take_mean(self, like: Tensor) -> Tensor:
        """What the layers since the last call add to the mean over all layers, [1] on the device of ``like``."""
        total, self._sum = self._sum, None
        if total is None:
            return torch.zeros(1, device=like.device)
        return (total / self._layers).reshape(1)

    def take_record(self, device: torch.device) -> Tensor:
        """Sums over the micro-batches of a step for every layer, [L, 1 + E]: the loss, and tokens by expert; then clear.

        Zeros for layers of other ranks.
        """
        found = torch.zeros(self._layers, 1 + self._experts, dtype=torch.float64, device=device)
        for layer, loss, counts in self._recorded:
            found[layer] += torch.cat([loss.reshape(1), counts])
        self._recorded.clear()
        return found


@dataclass(frozen=True)
class RoutingResult:
    """The routers in one step: the router loss, and the largest share of a layer's tokens that one expert got.

    ``expert_load`` is relative to an even share: 1 is even, and E / k means that every token of a layer chose the same expert.
    """

    loss: float
    expert_load: float


def routing_result(record: Tensor, micro_batches: int) -> RoutingResult:
    """The result from the record [L, 1 + E] of all ranks, which is a sum over ``micro_batches``."""
    losses, counts = record[:, 0] / micro_batches, record[:, 1:]
    load = counts.amax(dim=1) / counts.mean(dim=1)
    return RoutingResult(float(losses.mean()), float(load.max()))
