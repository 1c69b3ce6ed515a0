"""The model without a pipeline: Hugging Face parameter names, so that its ZeRO checkpoint is a transformers one."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from incr_ds.losses.arguments import Scalar
from incr_ds.losses.distillation import DistillationLoss
from incr_ds.model.attention import Attention, preferred_kernels
from incr_ds.model.layers import LayerFactory


class LanguageModel(nn.Module):
    """Pipeline layers ``layers`` of a model: 0 is the embedding, 1..L the decoder, L+1 the final norm, L+2 the head.

    With all of them it is the whole model; a teacher in a pipeline has a part on each stage.
    """

    def __init__(self, factory: LayerFactory, layers: range) -> None:
        super().__init__()
        num_layers = factory.architecture.num_layers
        body: dict[str, nn.Module] = {}
        if 0 in layers:
            body["embed_tokens"] = factory.embedding()
        body["layers"] = nn.ModuleDict(
            {str(layer): factory.block(layer) for layer in range(num_layers) if layer + 1 in layers}
        )
        if num_layers + 1 in layers:
            body["norm"] = factory.norm()
        self.model = nn.ModuleDict(body)
        if num_layers + 2 in layers:
            shares = factory.architecture.tied and "embed_tokens" in body
            self.lm_head = factory.head(body["embed_tokens"].weight if shares else None)
        self._positions = factory.positions
        self._recompute = factory.activation_checkpointing
        self._attention = factory.attention

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None = None,
        teacher_head: Tensor | None = None,
        alpha: Scalar = 0.0,
        temperature: Scalar = 1.0,
    ) -> DistillationLoss:
        """Loss of the whole model: ``labels`` [B, S] holds the token after each of ``input_ids`` [B, S]."""
        hidden = self.hidden_states(input_ids)
        return self.lm_head(hidden, labels, teacher_hidden, teacher_head, alpha=alpha, temperature=temperature)

    def hidden_states(self, stream: Tensor) -> Tensor:
        """Run the layers up to the head: ``stream`` is input_ids [B, S] at the embedding, else hidden [B, S, H]."""
        if "embed_tokens" in self.model:
            stream = self.model["embed_tokens"](stream)
        for name, block in self.model["layers"].items():
            arguments = self._positions.arguments(stream, int(name))
            stream = run_block(block, stream, arguments, self._recompute and self.training, self._attention)
        return self.model["norm"](stream) if "norm" in self.model else stream


def run_block(block: nn.Module, hidden: Tensor, arguments: Any, recompute: bool, attention: Attention) -> Tensor:
    """One decoder layer; with ``recompute`` its activations are computed again in the backward pass."""

    def run(stream: Tensor) -> Tensor:
        with preferred_kernels(attention):
            return block(stream, **arguments)

    return checkpoint(run, hidden, use_reentrant=False) if recompute else run(hidden)
