"""The model's input, from token ids to hidden states, and the input of its output head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from incr_ds.arch.architecture import Architecture


@dataclass(frozen=True)
class InputEmbedding:
    """Token embeddings times a scale, plus learned positions, with dropout, as the family declares.

    Not an nn.Module: the modules that own ``tokens`` and ``positions`` differ between plain engines and pipelines.
    """

    architecture: Architecture
    tokens: nn.Module
    positions: nn.Embedding | None

    def hidden_states(self, input_ids: Tensor, *, training: bool, positions: Tensor | None = None) -> Tensor:
        """[B, S] -> [B, S, H]. ``positions`` is [B, S]; None: 0, 1, ... in all sequences."""
        hidden = self.tokens(input_ids)  # [B, S, H]
        if self.architecture.family.embedding_scale is not None:
            # Rounded to the model's dtype, as in transformers.
            scale = torch.tensor(math.sqrt(self.architecture.sizes["hidden"]), dtype=hidden.dtype)
            hidden = hidden * scale.item()
        if self.architecture.family.embedding_multiplier is not None:
            hidden = hidden * float(self.architecture.config[self.architecture.family.embedding_multiplier])
        if self.positions is not None:
            # OPT's table has rows before the first position.
            first = self.positions.num_embeddings - self.architecture.sizes["positions"]
            if positions is None:
                positions = torch.arange(input_ids.shape[1], device=hidden.device)[None]
            hidden = hidden + self.positions(positions + first)  # [B, S, H] + [B or 1, S, H]
        dropout = self._dropout
        return F.dropout(hidden, dropout) if training and dropout else hidden

    @property
    def _dropout(self) -> float:
        field = self.architecture.family.embedding_dropout
        return 0.0 if field is None else float(self.architecture.config[field])


def head_input(architecture: Architecture, normed: Tensor) -> Tensor:
    """Scale ``normed`` hidden states [B, S, H] by the factor of the logits, which are linear in them.

    So neither the loss nor the teacher needs to know the factor.
    """
    factor = architecture.logit_factor
    return normed if factor == 1.0 else normed * factor
