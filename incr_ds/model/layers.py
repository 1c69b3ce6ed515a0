"""Builds the layers of a model one by one: transformers' own, cut over tensor ranks, filled with initial values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import TensorSpec
from incr_ds.config.layout import ParallelLayout
from incr_ds.losses.head import DistillationHead, LossSettings
from incr_ds.model.attention import Attention, transformers_attention
from incr_ds.model.positions import Positions
from incr_ds.model.tensor_parallel import TensorRanks, cut_linears, sum_partial_gradients
from incr_ds.model.weights import Weights
from incr_ds.target.placement import ShardedTensor, rank_parameters

HEAD = "lm_head.weight"


@dataclass(frozen=True)
class LayerFactory:
    """Makes fresh layers of one model for one rank, in ``dtype`` on ``device``."""

    architecture: Architecture
    ranks: TensorRanks
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    attention: Attention
    activation_checkpointing: bool = False
    loss: LossSettings = LossSettings()

    @cached_property
    def config(self) -> PretrainedConfig:
        """transformers' config of the model."""
        fields = {key: value for key, value in self.architecture.config.items() if key != "model_type"}
        config = AutoConfig.for_model(self.architecture.family.model_type, **fields)
        config._attn_implementation = transformers_attention(self.attention)
        return config

    @cached_property
    def positions(self) -> Positions:
        """Rotary embeddings and masks, shared by the layers."""
        return Positions(self.config, type(self._outline.model.rotary_emb)(self.config))

    def embedding(self) -> nn.Module:
        """Token ids [B, S] to hidden states [B, S, H]."""
        given = self._outline.model.embed_tokens
        with torch.device("meta"):
            holder = nn.ModuleDict(
                {"embed_tokens": nn.Embedding(given.num_embeddings, given.embedding_dim, given.padding_idx)}
            )
        self._finish(holder, "model.")
        return holder["embed_tokens"]

    def block(self, layer: int) -> nn.Module:
        """Decoder layer ``layer``."""
        kind = type(self._outline.model.layers[layer])
        with torch.device("meta"):
            block = kind(self.config, layer)
        return self._finish(block, f"model.layers.{layer}.")

    def norm(self) -> nn.Module:
        """The final norm."""
        with torch.device("meta"):
            norm = type(self._outline.model.norm)(self.config.hidden_size, eps=self.config.rms_norm_eps)
        return self._finish(norm, "model.norm.")

    def head(self, shared: nn.Parameter | None = None) -> DistillationHead:
        """The output projection with its loss; ``shared`` is the embedding's parameter when the two are tied."""
        shard = self._shards[self.architecture.by_name[HEAD].tied_to or HEAD]
        weight = shared if shared is not None else self._parameter(shard)
        # The name that DeepSpeed's gradient norm looks for, to count a cut tensor on every tensor rank.
        weight.tensor_model_parallel = self.ranks.group is not None
        return DistillationHead(weight, self.ranks.group, shard.bounds[0][0], shard.tensor.shape[0], self.loss)

    @cached_property
    def _outline(self) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)

    @cached_property
    def _shards(self) -> Mapping[str, ShardedTensor]:
        cut = ParallelLayout(tensor_parallel=self.ranks.size)
        return {shard.tensor.name: shard for shard in rank_parameters(self.architecture, cut, 0, self.ranks.rank)}

    def _finish(self, module: nn.Module, prefix: str) -> nn.Module:
        specs = self._specs(module, prefix)
        cut_linears(module, specs, self.ranks)
        for name, empty in list(module.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            filled = self._parameter(self._shards[prefix + name])
            # DeepSpeed's layers leave marks on the parameter that its optimizer reads.
            filled.__dict__.update(empty.__dict__)
            setattr(module.get_submodule(owner), attribute, filled)
        sum_partial_gradients(module, specs, self.ranks)
        return module

    def _specs(self, module: nn.Module, prefix: str) -> Mapping[str, TensorSpec]:
        return {name: self.architecture.by_name[prefix + name] for name, _ in module.named_parameters()}

    def _parameter(self, shard: ShardedTensor) -> nn.Parameter:
        values = self.weights.read(shard)
        return nn.Parameter(torch.empty(shard.shape, dtype=self.dtype, device=self.device).copy_(values))
