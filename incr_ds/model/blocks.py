"""Runs decoder layers: with their positions, recomputed in the backward pass if asked, and with their routers watched."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from incr_ds.model.attention import preferred_kernels
from incr_ds.model.layers import LayerFactory
from incr_ds.model.routing import Router


class DecoderLayer:
    """Decoder layer ``layer`` of ``factory``'s model. Not an nn.Module: ``block`` is, and gets registered where it belongs."""

    def __init__(self, factory: LayerFactory, layer: int) -> None:
        self.block: nn.Module = factory.block(layer)
        self._layer, self._factory = layer, factory
        router = factory.router
        self._router = None if router is None else Router(self.block.get_submodule(router))

    def run(self, hidden: Tensor) -> Tensor:
        """[B, S, H] -> [B, S, H]. While training, the router's loss goes to the factory's ``routing``."""
        factory = self._factory
        arguments = factory.positions.arguments(hidden, self._layer)
        training = self.block.training
        router = self._router if training else None

        def forward(stream: Tensor) -> tuple[Tensor, ...]:
            with preferred_kernels(factory.attention):
                output: Tensor = self.block(stream, **arguments)
            return (output,) if router is None else (output, *router.take())

        recompute = factory.activation_checkpointing and training
        output, *routed = checkpoint(forward, hidden, use_reentrant=False) if recompute else forward(hidden)
        if routed:
            factory.routing.add(self._layer, *routed)
        return output
