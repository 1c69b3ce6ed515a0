"""What decoder layers need besides the hidden state: rotary embeddings and attention masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from incr_ds.model.sequence_parallel import ONE_RANK, SequenceRanks

SLIDING = "sliding_attention"


def document_positions(input_ids: Tensor, end: int) -> Tensor:
    """The position of each token in its document, [B, S] -> [B, S]. A document ends with the token ``end``."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device)  # [S]
    begins = torch.zeros_like(input_ids)
    begins[:, 1:] = (input_ids[:, :-1] == end) * index[1:]
    return index - begins.cummax(dim=1).values


class Positions:
    """Arguments of transformers' decoder layers for sequences at positions 0, 1, ..., or at those of ``begin``.

    ``rotary`` is None for models whose layers do not use positions. Not an nn.Module: the engine casts modules to bf16,
    but inverse frequencies must stay fp32. The arguments for the last shape are cached, since every layer of every step
    needs the same ones. If ``ranks`` share each sample, positions are those of this rank's slice, and masks those of the
    whole sample, because attention sees all of it.
    """

    def __init__(self, config: PretrainedConfig, rotary: nn.Module | None, ranks: SequenceRanks = ONE_RANK) -> None:
        self._ranks = ranks
        self._config = config
        self._rotary = rotary
        self._key: tuple[Any, ...] | None = None
        self._kept: dict[str, Mapping[str, Any]] = {}
        self._given: Tensor | None = None

    @property
    def given(self) -> Tensor | None:
        """The positions of ``begin``, [B, S]."""
        return self._given

    def begin(self, positions: Tensor | None) -> None:
        """State the positions [B, S] of the sequences that the layers run on next (None: 0, 1, ... in all).

        Where they do not rise by one, a document begins. Tokens attend to their own document only.
        """
        if positions is not None or self._given is not None:
            self._given, self._key = positions, None

    def arguments(self, hidden: Tensor, layer: int) -> Mapping[str, Any]:
        """Keyword arguments of decoder layer ``layer`` for ``hidden`` [B, S, H]."""
        key = (hidden.shape[:2], hidden.dtype, hidden.device)
        if key != self._key:
            self._key, self._kept = key, {}
        kind = self._kind(layer)
        if kind not in self._kept:
            self._kept[kind] = self._build(hidden, kind)
        return self._kept[kind]

    def _kind(self, layer: int) -> str:
        types = getattr(self._config, "layer_types", None)
        if types is not None:
            return str(types[layer])
        window = getattr(self._config, "sliding_window", None)
        return "full_attention" if window is None else SLIDING

    @torch.no_grad()
    def _build(self, hidden: Tensor, kind: str) -> Mapping[str, Any]:
        position_ids = self._own_positions(hidden) if self._given is None else self._given
        make_mask = create_sliding_window_causal_mask if kind == SLIDING else create_causal_mask
        # None if scaled_dot_product_attention's own causal mask is enough.
        mask = make_mask(
            config=self._config,
            inputs_embeds=self._whole(hidden),
            attention_mask=None,
            past_key_values=None,
            position_ids=self._given,
        )
        arguments = {"attention_mask": mask, "position_ids": position_ids}
        if self._rotary is not None:
            # Gemma 3 has different frequencies for each kind of layer.
            kinds = (kind,) if hasattr(self._rotary, "layer_types") else ()
            arguments["position_embeddings"] = self._rotary(hidden, position_ids, *kinds)
        return arguments

    def _own_positions(self, hidden: Tensor) -> Tensor:
        """Positions [1, S] of the tokens of ``hidden`` [B, S, H] in their samples."""
        length = hidden.shape[1]
        return torch.arange(length, device=hidden.device)[None] + self._ranks.rank * length

    def _whole(self, hidden: Tensor) -> Tensor:
        """A stand-in for the hidden states of whole samples. Only its shape counts."""
        batch_size, length, _ = hidden.shape
        return hidden if self._ranks.size == 1 else hidden.new_empty(batch_size, length * self._ranks.size, 1)
