"""The frozen teacher, laid out like the student: tensor-parallel, with its layers spread over the pipeline stages."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from incr_ds.config.layout import ParallelLayout
from incr_ds.model.layers import LayerFactory
from incr_ds.model.plain import LanguageModel
from incr_ds.sharding.placement import stage_layers


class Teacher:
    """The teacher's part on one pipeline stage. Not an nn.Module, so that the student's parameters never include it."""

    def __init__(self, factory: LayerFactory, layout: ParallelLayout, stage: int) -> None:
        # Its layers are spread evenly, whatever the student's stages are.
        even = layout.model_copy(update={"stages": "even"})
        layers = stage_layers(factory.architecture.num_layers, even)[stage]
        factory = replace(factory, activation_checkpointing=False)
        self._model = LanguageModel(factory, layers).eval().requires_grad_(False)
        self._dtype = factory.dtype

    @property
    def head(self) -> Tensor | None:
        """This rank's rows [V, Ht] of the teacher's output projection, or None before the last stage."""
        head = getattr(self._model, "lm_head", None)
        return None if head is None else head.weight

    @torch.no_grad()
    def forward(self, stream: Tensor, positions: Tensor | None = None) -> Tensor:
        """input_ids at the first stage, packed hidden states after it -> this stage's hidden states [B, S, Ht].

        ``positions`` are those of ``LanguageModel.hidden_states``.
        """
        hidden = self.unpack(stream) if stream.dtype == torch.uint8 else stream
        return self._model.hidden_states(hidden, positions)

    def unpack(self, packed: Tensor) -> Tensor:
        """Turn the bytes of ``pack`` back into hidden states: uint8 [B, S, Ht * itemsize] -> [B, S, Ht]."""
        return packed.view(self._dtype)


def pack(hidden: Tensor) -> Tensor:
    """Hidden states as bytes, uint8 [B, S, Ht * itemsize].

    DeepSpeed's pipeline expects a gradient for every floating-point tensor that it sends, and the teacher has none.
    """
    return hidden.contiguous().view(torch.uint8)
