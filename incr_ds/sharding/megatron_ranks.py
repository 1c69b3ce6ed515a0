"""What one rank of Megatron-core's GPTModel holds: its parameters by name, in the order in which its modules register them.

Its optimizers name no parameter. Numbers and places in their state follow from this order. Facts: megatron-core 0.12 to 0.19
(models/gpt, optimizer/, distributed/param_and_grad_buffer.py) and Transformer Engine 2.18 (pytorch/module).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product

from incr_ds.arch.architecture import Architecture
from incr_ds.config.growth import Implementation
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.megatron_modules import (
    MEGATRON_CORE,
    ModuleDeclaration,
    module_parameters,
    modules_of,
)

ALIGNED = 64  # elements, to a multiple of which the distributed optimizer pads the start of a parameter


def decays(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter decays. Those that do are the optimizer's first group, and the others its second."""
    return len(shape) > 1 and not name.endswith(".bias")


def buffer_starts(sizes: Mapping[str, int], unit: int, alone: str | None = None) -> tuple[Mapping[str, int], int]:
    """Where each parameter starts in the distributed optimizer's buffer, and the buffer's size, all in elements.

    ``sizes`` are the parameters' in the order of the model; the buffer holds the last one first. Starts are multiples of
    ``unit``, counted from the start of a bucket. The parameter ``alone`` has a bucket of its own, which ends unpadded.
    """
    starts: dict[str, int] = {}
    bucket = end = 0
    for name, size in reversed(list(sizes.items())):
        starts[name] = bucket + math.ceil((end - bucket) / unit) * unit
        end = starts[name] + size
        if name == alone:
            bucket = end
    return starts, end


@dataclass(frozen=True, eq=False)
class GPTModelRank:
    """The part of a GPTModel on one tensor rank of one pipeline stage.

    ``degrees`` are the tensor- and the pipeline-parallel one; the latter divides the layers. ``vocabulary`` is the number of
    rows of embedding and head on all tensor ranks.
    """

    architecture: Architecture
    degrees: tuple[int, int]
    tensor_rank: int
    stage: int
    vocabulary: int
    implementation: Implementation

    @property
    def is_last(self) -> bool:
        """Whether the head is here."""
        return self.stage == self.degrees[1] - 1

    @property
    def shared(self) -> str | None:
        """The parameter that the first and the last stage share, if the embedding is tied and both are here."""
        places = {0: "embedding", self.degrees[1] - 1: "head"}
        if not self.architecture.tied or len(places) == 1 or self.stage not in places:
            return None
        return next(item.name for item in modules_of(MEGATRON_CORE).parameters if item.place == places[self.stage])

    @cached_property
    def parameters(self) -> Mapping[str, RankParameter]:
        """Its parameters, with layers numbered from 0 on each stage. The last stage has a copy of a tied embedding."""
        (ranks, _), modules = self.degrees, modules_of(MEGATRON_CORE)
        by_layer = module_parameters(modules, self.architecture, ranks, self.tensor_rank, self.vocabulary)
        held = [item for layer, items in by_layer.items() if self._has(layer) for item in items]
        found = {self._name(item): item for item in sorted(held, key=self._place)}
        if self.is_last and self.shared is not None:
            found[self.shared] = by_layer[modules.embedding][0]
        return found

    @property
    def extra_states(self) -> Iterator[str]:
        """The keys of the extra states of its modules."""
        own = {name.rpartition(".")[0] for name in self.parameters}
        for declared in modules_of(MEGATRON_CORE).registered:
            if self.implementation in declared.extra_state:
                yield from (f"{name}._extra_state" for name in self._modules(declared) if declared.bare or name in own)

    @property
    def _layers(self) -> range:
        """Its decoder layers, by their numbers in the whole model."""
        count = self.architecture.num_layers // self.degrees[1]
        return range(self.stage * count, (self.stage + 1) * count)

    def _has(self, layer: int) -> bool:
        """Whether the embedding, a decoder layer, the last norm or the head is on this stage."""
        modules = modules_of(MEGATRON_CORE)
        decoder = layer - modules.first_decoder
        if layer == modules.embedding:
            return self.stage == 0
        return decoder in self._layers or (self.is_last and decoder >= self.architecture.num_layers)

    def _name(self, parameter: RankParameter) -> str:
        name = self._template(parameter).format(expert=parameter.tensor.expert)
        layer = parameter.tensor.layer
        return name if layer is None else f"decoder.layers.{layer - self._layers.start}.{name}"

    def _place(self, parameter: RankParameter) -> tuple[int, int, int]:
        """What parameters are sorted by. Experts are a layer's last modules, each with all its own."""
        expert, module = parameter.tensor.expert, self._template(parameter).rpartition(".")[0]
        return parameter.pipeline_layer, -1 if expert is None else expert, _order()[module]

    def _template(self, parameter: RankParameter) -> str:
        return _names("experts" in self.architecture.sizes, self.implementation)[parameter.local_name]

    def _modules(self, declared: ModuleDeclaration) -> Iterator[str]:
        """The names of the modules that a declaration may stand for here."""
        experts = range(self.architecture.sizes.get("experts", 0)) if "{expert}" in declared.name else (None,)
        if declared.place == "decoder":
            for number, expert in product(range(len(self._layers)), experts):
                yield f"decoder.layers.{number}.{declared.name.format(expert=expert)}"
        elif self.stage == 0 if declared.place == "embedding" else self.is_last:
            yield declared.name


@cache
def _order() -> Mapping[str, int]:
    """The place of each module in the order of registration."""
    return {declared.name: number for number, declared in enumerate(modules_of(MEGATRON_CORE).registered)}


@cache
def _names(in_mixture: bool, implementation: Implementation) -> Mapping[str, str]:
    """The name that each parameter has in a rank's model, by its key in distributed checkpoints."""
    found: dict[str, str] = {}
    for item in modules_of(MEGATRON_CORE).parameters:
        local = item.local if implementation == "local" else None
        found.setdefault(item.name, local or (in_mixture and item.in_mixtures) or item.in_ranks or item.name)
    return found
