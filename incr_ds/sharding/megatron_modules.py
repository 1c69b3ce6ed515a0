"""Training codes with their own parameter names and fused parameters, declared in frameworks/*.yaml."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import TensorSpec
from incr_ds.config.fields import Settings, parse_settings
from incr_ds.config.yaml_file import read_yaml
from incr_ds.errors import LayoutError
from incr_ds.sharding.blocks import Block, RankParameter

FOLDER = Path(__file__).parent / "frameworks"
MEGATRON, MEGATRON_CORE = "megatron-deepspeed", "megatron-core"
CUT_AXES = ("vocab", "heads", "kv_heads", "ffn")
Place = Literal["embedding", "decoder", "norm", "head"]


class ParameterDeclaration(Settings):
    """One line of a modules file; see frameworks/megatron-deepspeed.yaml."""

    place: Place
    name: str
    holds: list[str] = Field(min_length=1)
    per: Literal["kv_heads", "ranks"] | None = None
    padded: bool = False
    also: list[str] = Field(default_factory=list)


class Modules(Settings):
    """The modules of a training code: the families it supports, its pipeline layers and its parameters."""

    families: list[str]
    embedding: int
    first_decoder: int
    tied_key: str
    parameters: list[ParameterDeclaration]


@cache
def modules_of(name: str) -> Modules:
    """Read the modules file ``name``."""
    path = FOLDER / f"{name}.yaml"
    return parse_settings(read_yaml(path), Modules, str(path))


def num_pipeline_layers(modules: Modules, architecture: Architecture) -> int:
    """Number of pipeline layers up to the head."""
    return modules.first_decoder + architecture.num_layers + 2


def padded_vocabulary(vocab: int, multiple: int, tensor_parallel: int) -> int:
    """Megatron's rule: the next multiple of ``multiple`` times the tensor-parallel degree."""
    unit = multiple * tensor_parallel
    return math.ceil(vocab / unit) * unit


def padding_notes(architecture: Architecture, rows: int) -> tuple[str, ...]:
    """A note if an embedding of ``rows`` rows has some that are not part of the model."""
    vocab = architecture.sizes["vocab"]
    if rows == vocab:
        return ()
    return (
        f"the source's vocabulary is padded from {vocab} to {rows} rows, and the padding is left out; if it was trained and "
        f"must stay, set {architecture.family.axes['vocab']}: {rows} in config.json",
    )


def check_modules(modules: Modules, architecture: Architecture, tensor_parallel: int, where: str) -> None:
    """Raise LayoutError if the training code does not have this model, or cannot cut it over the tensor ranks."""
    family, sizes = architecture.family, architecture.sizes
    if family.model_type not in modules.families:
        raise LayoutError(
            f"{where}: it has no modules for {family.model_type}; supported: {', '.join(modules.families)}."
        )
    evenly = {family.axes[axis]: sizes[axis] for axis in ("kv_heads", "heads", "ffn") if axis in family.axes}
    undivided = [f"{field} {size}" for field, size in evenly.items() if size % tensor_parallel]
    if undivided:
        most = math.gcd(*evenly.values())
        fitting = ", ".join(str(degree) for degree in range(1, most + 1) if most % degree == 0)
        raise LayoutError(
            f"{where}: tensor_parallel {tensor_parallel}: does not divide {', '.join(undivided)}, and Megatron cuts evenly only; "
            f"tensor_parallel can be {fitting}."
        )


def module_parameters(
    modules: Modules, architecture: Architecture, tensor_parallel: int, tensor_rank: int, vocabulary: int
) -> Mapping[int, tuple[RankParameter, ...]]:
    """The parameters of a tensor rank by pipeline layer, in the order of each module.

    ``vocabulary`` is the number of rows of embedding and head over all ranks, including padding. A tied head has no entry.
    """
    specs = {(spec.layer, spec.local_name): spec for spec in architecture.stored}
    found: dict[int, list[RankParameter]] = {}
    for layer, decoder, declared in _occurrences(modules, architecture):
        held = [specs[decoder, name] for name in declared.holds if (decoder, name) in specs]
        if len(held) == len(declared.holds):
            made = _Maker(modules, architecture, tensor_parallel, tensor_rank, vocabulary)
            found.setdefault(layer, []).append(made.parameter(layer, declared, held))
    return {layer: tuple(parameters) for layer, parameters in sorted(found.items())}


def _occurrences(
    modules: Modules, architecture: Architecture
) -> Iterator[tuple[int, int | None, ParameterDeclaration]]:
    """Yield (pipeline layer, decoder layer, declaration) for every parameter."""
    after = modules.first_decoder + architecture.num_layers
    fixed = {"embedding": modules.embedding, "norm": after, "head": after + 1}
    for declared in modules.parameters:
        if declared.place == "decoder":
            for decoder in range(architecture.num_layers):
                yield modules.first_decoder + decoder, decoder, declared
        else:
            yield fixed[declared.place], None, declared


@dataclass(frozen=True)
class _Maker:
    modules: Modules
    architecture: Architecture
    ranks: int
    rank: int
    vocabulary: int

    def parameter(self, layer: int, declared: ParameterDeclaration, held: list[TensorSpec]) -> RankParameter:
        first = held[0]
        cut = next((d for d, dim in enumerate(first.dims) if dim.outer_axis in CUT_AXES), None)
        if declared.per is not None:
            units = self.ranks if declared.per == "ranks" else self.architecture.sizes["kv_heads"]
            blocks = _interleaved(
                held, units, range(self.rank * units // self.ranks, (self.rank + 1) * units // self.ranks)
            )
            shape = (sum(spec.shape[0] for spec in held) // self.ranks, *first.shape[1:])
        elif declared.padded:
            blocks, shape = self._vocabulary_rows(first)
        else:
            blocks, shape = _even_cut(first, cut, self.ranks, self.rank)
        tied = declared.place == "embedding" and self.architecture.tied
        prefix = f"tied_modules.{self.modules.tied_key}" if tied else str(layer)
        sub_parameters = len(held) if declared.per == "ranks" else 1
        name = f"{prefix}.{declared.name}"
        place = (first, layer, declared.name, cut, declared.padded, sub_parameters)
        return RankParameter(name, shape, blocks, *place)

    def _vocabulary_rows(self, spec: TensorSpec) -> tuple[tuple[Block, ...], tuple[int, ...]]:
        local = self.vocabulary // self.ranks
        begin, end = self.rank * local, min((self.rank + 1) * local, spec.shape[0])
        blocks = (Block(spec.name, ((begin, end), (0, spec.shape[1]))),) if begin < end else ()
        return blocks, (local, *spec.shape[1:])


def _even_cut(spec: TensorSpec, cut: int | None, ranks: int, rank: int) -> tuple[tuple[Block, ...], tuple[int, ...]]:
    bounds = [(0, size) for size in spec.shape]
    if cut is not None:
        local = spec.shape[cut] // ranks
        bounds[cut] = (rank * local, (rank + 1) * local)
    block = Block(spec.name, tuple(bounds))
    return (block,), block.shape


def _interleaved(held: list[TensorSpec], units: int, chosen: range) -> tuple[Block, ...]:
    """Rows of every chosen unit, tensor after tensor within the unit."""
    blocks, row = [], 0
    for unit in chosen:
        for spec in held:
            rows = spec.shape[0] // units
            columns = ((0, size) for size in spec.shape[1:])
            blocks.append(Block(spec.name, ((unit * rows, (unit + 1) * rows), *columns), row))
            row += rows
    return tuple(blocks)
