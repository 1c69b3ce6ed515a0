"""Builds the layers of a model one by one: transformers' layers, cut over tensor ranks, with initial values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import Role, TensorSpec
from incr_ds.config.layout import ParallelLayout
from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.head import DistillationHead, Loss
from incr_ds.model.attention import Attention, transformers_attention
from incr_ds.model.positions import Positions
from incr_ds.model.routing import Routing
from incr_ds.model.sequence_parallel import ONE_RANK, SequenceRanks, shared_attention
from incr_ds.model.tensor_parallel import TensorRanks, cut_experts, cut_linears, sum_partial_gradients
from incr_ds.model.weights import Weights
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.expert_products import ExpertProducts, grouped_experts
from incr_ds.sharding.joined import JoinedParameter, joined_parameters
from incr_ds.sharding.placement import rank_parameters, split_bounds

HEAD = "lm_head.weight"


def module_path(architecture: Architecture, spec: TensorSpec) -> str:
    """Path, in transformers' model, of the module that holds a tensor: its decoder layer, or a module outside of them."""
    return spec.name.rpartition(".")[0] if spec.layer is None else f"{architecture.family.layers_path}.{spec.layer}"


@dataclass(frozen=True)
class LayerFactory:
    """Builds fresh layers of one model for one rank, in ``dtype`` on ``device``.

    With ``document_end``, the token that ends a document, attention and positions begin anew behind it. ``router_loss`` is
    the factor of a mixture's router loss. ``sequence_ranks`` share each sample. ``experts`` is how a mixture's are multiplied.
    ``partition`` is called with each module as soon as it has its values.
    """

    architecture: Architecture
    ranks: TensorRanks
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    attention: Attention
    activation_checkpointing: bool = False
    loss: Loss = distillation_loss
    document_end: int | None = None
    router_loss: float = 0.0
    sequence_ranks: SequenceRanks = ONE_RANK
    experts: ExpertProducts = "auto"
    partition: Callable[[nn.Module], None] | None = None

    @cached_property
    def config(self) -> PretrainedConfig:
        """transformers' config of the model."""
        fields = {key: value for key, value in self.architecture.config.items() if key != "model_type"}
        config = AutoConfig.for_model(self.architecture.family.model_type, **fields)
        config._attn_implementation = transformers_attention(self.attention)
        if self.architecture.family.joined:
            grouped = grouped_experts(self.experts, self.architecture, self.ranks.size, self.dtype.itemsize)
            config._experts_implementation = "grouped_mm" if grouped else "eager"
        return config

    @cached_property
    def _block_config(self) -> PretrainedConfig:
        """The config of decoder layers: with this rank's share of every expert, and attention that exchanges slices of samples
        if ranks share these."""
        config = copy.deepcopy(self.config)
        for one in self._experts.values():
            start, stop = split_bounds(one.size, self.ranks.size)[self.ranks.rank]
            setattr(config, self.architecture.family.axes["ffn"], stop - start)
        if self.sequence_ranks.size > 1:
            config._attn_implementation = shared_attention(self.architecture, self.sequence_ranks)
        return config

    @cached_property
    def positions(self) -> Positions:
        """Rotary embeddings and masks, shared by the layers."""
        meta = getattr(self._base, "rotary_emb", None)
        return Positions(self.config, None if meta is None else type(meta)(self.config), self.sequence_ranks)

    @cached_property
    def routing(self) -> Routing:
        """The router losses of the layers; None are added for a dense model."""
        return Routing(self.architecture)

    @property
    def router(self) -> str | None:
        """Path of the router inside a decoder layer; None for a dense model."""
        found = (spec.local_name for spec in self.architecture.stored if spec.role == "router")
        return next((name.rpartition(".")[0] for name in found), None)

    def path(self, role: Role) -> str:
        """Path, in transformers' model, of the module outside of the layers that holds the tensors of ``role``."""
        return module_path(self.architecture, next(spec for spec in self.architecture.tensors if spec.role == role))

    def module(self, role: Role) -> nn.Module:
        """The module of ``role``: embedding, positions or final_norm."""
        given = self._outline.get_submodule(self.path(role))
        with torch.device("meta"):
            if isinstance(given, nn.Embedding):
                # A plain embedding: InputEmbedding does what a family's own class adds.
                given = nn.Embedding(given.num_embeddings, given.embedding_dim, given.padding_idx)
            holder = nn.ModuleDict({"module": copy.deepcopy(given)})
        return self._finish(holder, {"module": self.path(role)})["module"]

    def block(self, layer: int) -> nn.Module:
        """Decoder layer ``layer``."""
        path = f"{self.architecture.family.layers_path}.{layer}"
        with torch.device("meta"):
            block = type(self._outline.get_submodule(path))(self._block_config, layer)
        finished = self._finish(nn.ModuleDict({"block": block}), {"block": path})["block"]
        for experts in {name.rpartition(".")[0] for name in self._experts}:
            cut_experts(finished.get_submodule(experts), self.ranks)
        return finished

    def head(self, shared: nn.Parameter | None = None) -> DistillationHead:
        """The output projection with its loss. ``shared`` is the embedding's parameter if the two are tied."""
        shard = self._shards[self.architecture.by_name[HEAD].tied_to or HEAD]
        weight = shared if shared is not None else self._parameter(shard)
        # DeepSpeed's gradient norm reads this attribute, to count a cut tensor on every tensor rank.
        vars(weight)["tensor_model_parallel"] = self.ranks.group is not None
        head = DistillationHead(weight, self.ranks.group, shard.bounds[0][0], shard.tensor.shape[0], self.loss)
        if self.partition is not None:
            self.partition(head)
        return head

    @cached_property
    def _experts(self) -> Mapping[str, JoinedParameter]:
        """Parameters that hold all experts of a layer, by name inside it."""
        return {one.local_name: one for one in joined_parameters(self.architecture).values() if one.layer == 0}

    @cached_property
    def _outline(self) -> PreTrainedModel:
        with torch.device("meta"):
            outline: PreTrainedModel = AutoModelForCausalLM.from_config(self.config)
        return outline

    @cached_property
    def _shards(self) -> Mapping[str, RankParameter]:
        cut = ParallelLayout(tensor_parallel=self.ranks.size)
        return {shard.parameter: shard for shard in rank_parameters(self.architecture, cut, 0, self.ranks.rank)}

    @property
    def _base(self) -> nn.Module:
        return self._outline.get_submodule(self.architecture.family.base)

    def _finish(self, holder: nn.ModuleDict, paths: Mapping[str, str]) -> nn.ModuleDict:
        """Cut and fill the modules in ``holder``. ``paths`` are their paths in transformers' model."""
        names = {
            f"{key}.{name}": f"{path}.{name}"
            for key, path in paths.items()
            for name, _ in holder[key].named_parameters()
        }
        specs = {inside: self._shards[name].tensor for inside, name in names.items()}
        cut_linears(holder, specs, self.ranks)
        for inside, empty in list(holder.named_parameters()):
            owner, _, attribute = inside.rpartition(".")
            filled = self._parameter(self._shards[names[inside]])
            # DeepSpeed's layers set attributes on the parameter that its optimizer reads.
            filled.__dict__.update(empty.__dict__)
            setattr(holder.get_submodule(owner), attribute, filled)
        sum_partial_gradients(holder, specs, self.ranks)
        if self.partition is not None:
            self.partition(holder)
        return holder

    def _parameter(self, shard: RankParameter) -> nn.Parameter:
        values = self.weights.read(shard)
        return nn.Parameter(torch.empty(shard.shape, dtype=self.dtype, device=self.device).copy_(values))
