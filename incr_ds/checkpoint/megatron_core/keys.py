"""Where each logical tensor lies in the stored ones of a Megatron-core checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
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
_CHAINED = re.compile(r"chained_\d+\.(?=optimizer\.)")  # the optimizer of the experts, and that of the rest
_NEMO = "module."  # the model inside of NeMo's module
_HALVES = ("_w", "_v")  # gate and up, where each has a key of its own
_SHOWN = 10
Stack = tuple[tuple[int, int], ...]
_UNSTACKED: Stack = ()
EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Located:
    """A block of a logical tensor, at its row in the stored tensor ``key``.

    If layers, or experts, or both are stacked in the stored tensor, ``stack`` has for each the block's own and how many
    there are.
    """

    key: str
    stack: Stack
    block: Block


def unchained(tensors: Mapping[str, StoredTensor], where: str) -> Mapping[str, StoredTensor]:
    """Tensors by their keys without the number of their optimizer. Megatron-core before 0.14 chained several in a mixture."""
    found = {_CHAINED.sub("", key): tensor for key, tensor in tensors.items()}
    if len(found) != len(tensors):
        raise CheckpointError(
            f"{where}: several chained optimizers have a state of the same key; expected one of the experts, and one of the "
            "rest. Save the checkpoint without --overlap-param-gather-with-optimizer-step."
        )
    return found


def located(
    tensors: Mapping[str, StoredTensor], state: State | Literal["model"], architecture: Architecture, where: str
) -> Mapping[str, tuple[Located, ...]]:
    """The blocks of every logical tensor by its name; none if the checkpoint has no such state.

    Raises CheckpointError that lists the parameters that are missing or of another shape. For the model's own weights, also
    those that the model does not have.
    """
    for prefix in _PREFIXES[state]:
        for inner in (prefix, prefix + _NEMO):
            embedding = tensors.get(inner + EMBEDDING)
            if embedding is not None and len(embedding.shape) == 2:  # in fully_sharded_model_space it has a third
                return _Search(tensors, inner, architecture).all(where)
    return {}


@dataclass(frozen=True)
class _Search:
    tensors: Mapping[str, StoredTensor]
    prefix: str
    architecture: Architecture

    def all(self, where: str) -> Mapping[str, tuple[Located, ...]]:
        found: dict[str, list[Located]] = {}
        problems: list[str] = []
        modules = modules_of(MEGATRON_CORE)
        rows = self.tensors[self.prefix + EMBEDDING].shape[0]
        if rows < self.architecture.sizes["vocab"]:
            problems.append(f"  {self.prefix}embedding: {rows} rows, fewer than {self.architecture.sizes['vocab']}")
        declared = module_parameters(modules, self.architecture, 1, 0, max(rows, self.architecture.sizes["vocab"]))
        for parameters in declared.values():
            for parameter in parameters:
                places = self._places(parameter)
                problems += [] if places else [f"  {self._named(parameter)}: missing"]
                for place, shape in places:
                    problems += self._shape_problem(place, shape)
                    found.setdefault(place.block.name, []).append(place)
        problems += self._unknown({place.key for places in found.values() for place in places})
        if problems:
            more = [f"  and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            first = f"{where}: {len(problems)} parameter(s) do not match the config; is it this checkpoint's?"
            raise CheckpointError("\n".join([first, *problems[:_SHOWN], *more]))
        return {name: tuple(places) for name, places in found.items()}

    def _places(self, parameter: RankParameter) -> list[tuple[Located, tuple[int, ...]]]:
        """The blocks of a parameter, each with the shape that its stored tensor must have."""
        for key, stack in self._candidates(parameter):
            if key in self.tensors:
                return [(Located(key, stack, block), parameter.shape) for block in parameter.blocks]
            halves = [key + half for half in _HALVES]
            if parameter.sub_parameters == len(halves) and all(half in self.tensors for half in halves):
                shape = (parameter.shape[0] // len(halves), *parameter.shape[1:])
                pairs = zip(halves, parameter.blocks, strict=True)
                return [(Located(half, stack, replace(block, row=0)), shape) for half, block in pairs]
        return []

    def _candidates(self, parameter: RankParameter) -> Iterator[tuple[str, Stack]]:
        """Keys that a parameter may have, each with its place among what is stacked under the key."""
        layer, expert = parameter.tensor.layer, parameter.tensor.expert
        for template in known_names(parameter):
            name, inside = template.format(expert=expert), _UNSTACKED
            if expert is not None and name == template:
                inside = ((expert, self.architecture.sizes["experts"]),)
            if layer is None:
                yield self.prefix + name, _UNSTACKED
            else:
                yield f"{self.prefix}decoder.layers.{name}", ((layer, self.architecture.num_layers), *inside)
                yield f"{self.prefix}decoder.layers.{layer}.{name}", inside

    def _named(self, parameter: RankParameter) -> str:
        layer = "" if parameter.tensor.layer is None else f"decoder.layers.{parameter.tensor.layer}."
        return f"{self.prefix}{layer}{parameter.local_name}"

    def _shape_problem(self, place: Located, shape: tuple[int, ...]) -> list[str]:
        stored, counts = self.tensors[place.key], tuple(count for _, count in place.stack)
        if stored.parts is not None and stored.parts[: len(counts)] != counts:
            found = list(stored.parts[: len(counts)])
            return [f"  {place.key}: expected a part for each layer and expert, {list(counts)}, found {found}"]
        expected = (*counts, *shape)
        if stored.shape == expected:
            return []
        return [f"  {place.key}: expected shape {list(expected)}, found {list(stored.shape)}"]

    def _unknown(self, known: set[str]) -> list[str]:
        own = [key for key in self.tensors if key.startswith(self.prefix) and "._extra_state" not in key]
        if not self.prefix:
            own = [key for key in own if not key.startswith("optimizer.") and not key.startswith("chained_")]
        further = [key for key in own if key not in known]
        # A key of the same bytes is another name, as this package gives to a mixture's norms.
        named = {self.tensors[key].chunks for key in known} if further else set()
        model = self.architecture.family.model_type
        return [f"  {key}: not a parameter of this {model}" for key in further if self.tensors[key].chunks not in named]


def known_names(parameter: RankParameter) -> tuple[str, ...]:
    """The names that a parameter may have in its layer, or in the model if it is in none. {expert} stands for a number."""
    return _names()[parameter.local_name]


def written_names(parameter: RankParameter, architecture: Architecture) -> tuple[str, ...]:
    """The names under which a parameter is written, that in Transformer Engine's modules first."""
    further = _names_in_mixtures().get(parameter.local_name) if "experts" in architecture.sizes else None
    return (parameter.local_name,) if further is None else (further, parameter.local_name)


@cache
def _names() -> Mapping[str, tuple[str, ...]]:
    """All names of each parameter, whatever the family."""
    found: dict[str, dict[str, None]] = {}
    for declared in modules_of(MEGATRON_CORE).parameters:
        others = (declared.local, declared.in_ranks, *declared.also)
        found.setdefault(declared.name, {}).update(dict.fromkeys((declared.name, *filter(None, others))))
    return {name: tuple(names) for name, names in found.items()}


@cache
def _names_in_mixtures() -> Mapping[str, str]:
    declared = modules_of(MEGATRON_CORE).parameters
    return {item.name: item.in_mixtures for item in declared if item.in_mixtures is not None}
