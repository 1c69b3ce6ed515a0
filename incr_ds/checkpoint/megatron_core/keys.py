"""Where each logical tensor lies in the stored ones of a Megatron-core checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import State
from incr_ds.checkpoint.megatron_core.metadata import StoredTensor
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Block, RankParameter
from incr_ds.sharding.megatron_modules import MEGATRON_CORE, module_parameters, modules_of

# The keys of an optimizer's state are those of the parameters, after this. "model": the model's own weights.
MODEL_PREFIX = ""
OF_DISTRIBUTED_OPTIMIZER, OF_OPTIMIZER = "optimizer.state.param.", "optimizer.state.fp32_param."
MOMENT_PREFIXES: Mapping[State, str] = {
    "exp_avg": "optimizer.state.exp_avg.",
    "exp_avg_sq": "optimizer.state.exp_avg_sq.",
}
_PREFIXES: Mapping[State | Literal["model"], tuple[str, ...]] = {
    "weight": (OF_OPTIMIZER, OF_DISTRIBUTED_OPTIMIZER, MODEL_PREFIX),
    **{state: (prefix,) for state, prefix in MOMENT_PREFIXES.items()},
    "model": (MODEL_PREFIX,),
}
_NEMO = "module."  # the model inside of NeMo's module
_HALVES = ("_w", "_v")  # gate and up, where each has a key of its own
_SHOWN = 10
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Located:
    """A block of a logical tensor, at its row in the stored tensor ``key``, or in ``layer`` of it."""

    key: str
    layer: int | None
    block: Block


def located(
    tensors: Mapping[str, StoredTensor], state: State | Literal["model"], architecture: Architecture, where: str
) -> Mapping[str, tuple[Located, ...]] | None:
    """The blocks of every logical tensor by its name, sorted by rows; None if the checkpoint has no such state.

    Raises CheckpointError that lists the parameters that are missing or of another shape. For the model's own weights, also
    those that the model does not have.
    """
    for prefix in _PREFIXES[state]:
        for inner in (prefix, prefix + _NEMO):
            embedding = tensors.get(inner + EMBEDDING)
            if embedding is not None and len(embedding.shape) == 2:  # in fully_sharded_model_space it has a third
                return _Search(tensors, inner, architecture).all(where)
    return None


@dataclass(frozen=True)
class _Search:
    tensors: Mapping[str, StoredTensor]
    prefix: str
    architecture: Architecture

    def all(self, where: str) -> Mapping[str, tuple[Located, ...]]:
        found: dict[str, list[Located]] = {}
        problems: list[str] = []
        modules = modules_of(MEGATRON_CORE)
        rows = self.tensors[f"{self.prefix}embedding.word_embeddings.weight"].shape[0]
        if rows < self.architecture.sizes["vocab"]:
            problems.append(f"  {self.prefix}embedding: {rows} rows, fewer than {self.architecture.sizes['vocab']}")
        declared = module_parameters(modules, self.architecture, 1, 0, max(rows, self.architecture.sizes["vocab"]))
        for layer, parameters in declared.items():
            decoder = layer - modules.first_decoder
            for parameter in parameters:
                places = self._places(parameter, decoder if parameter.tensor.layer is not None else None)
                problems += [] if places else [f"  {self._named(parameter, decoder)}: missing"]
                for place, shape in places:
                    problems += self._shape_problem(place, shape)
                    found.setdefault(place.block.name, []).append(place)
        problems += self._unknown({place.key for places in found.values() for place in places})
        if problems:
            more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            first = f"{where}: {len(problems)} parameter(s) do not match the config; is it this checkpoint's?"
            raise CheckpointError("\n".join([first, *problems[:_SHOWN], *more]))
        return {name: tuple(sorted(places, key=lambda place: place.block.bounds)) for name, places in found.items()}

    def _places(self, parameter: RankParameter, decoder: int | None) -> list[tuple[Located, tuple[int, ...]]]:
        """The blocks of a parameter, each with the shape that its stored tensor must have."""
        for key, layer in self._candidates(parameter, decoder):
            if key in self.tensors:
                return [(Located(key, layer, block), parameter.shape) for block in parameter.blocks]
            halves = [key + half for half in _HALVES]
            if parameter.sub_parameters == len(halves) and all(half in self.tensors for half in halves):
                shape = (parameter.shape[0] // len(halves), *parameter.shape[1:])
                pairs = zip(halves, parameter.blocks, strict=True)
                return [(Located(half, layer, replace(block, row=0)), shape) for half, block in pairs]
        return []

    def _candidates(self, parameter: RankParameter, decoder: int | None) -> Iterator[tuple[str, int | None]]:
        """Keys that a parameter may have, with the layer inside of it if layers are stacked."""
        if decoder is None:
            yield self.prefix + parameter.local_name, None
            return
        also = next(item.also for item in modules_of(MEGATRON_CORE).parameters if item.name == parameter.local_name)
        for name in (parameter.local_name, *also):
            yield f"{self.prefix}decoder.layers.{name}", decoder
            yield f"{self.prefix}decoder.layers.{decoder}.{name}", None

    def _named(self, parameter: RankParameter, decoder: int) -> str:
        layer = "" if parameter.tensor.layer is None else f"decoder.layers.{decoder}."
        return f"{self.prefix}{layer}{parameter.local_name}"

    def _shape_problem(self, place: Located, shape: tuple[int, ...]) -> list[str]:
        found = self.tensors[place.key].shape
        expected = shape if place.layer is None else (self.architecture.num_layers, *shape)
        parts = self.tensors[place.key].parts
        if place.layer is not None and parts is not None and parts[0] != self.architecture.num_layers:
            return [f"  {place.key}: expected a part for each layer, found {parts[0]}"]
        if found == expected:
            return []
        return [f"  {place.key}: expected shape {list(expected)}, found {list(found)}"]

    def _unknown(self, known: set[str]) -> list[str]:
        own = [key for key in self.tensors if key.startswith(self.prefix)]
        if not self.prefix:
            own = [key for key in own if not key.startswith("optimizer.") and not key.startswith("chained_")]
        return [
            f"  {key}: not a parameter of this {self.architecture.family.model_type}"
            for key in own
            if key not in known and "._extra_state" not in key
        ]
