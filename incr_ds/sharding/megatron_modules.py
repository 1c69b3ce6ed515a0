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
from incr_ds.config.growth import Implementation
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
    parts: int = Field(default=1, ge=1)
    transposed: bool = False
    padded: bool = False
    local: str | None = None
    in_mixtures: str | None = None
    in_ranks: str | None = None
    also: list[str] = Field(default_factory=list)

    @property
    def of_experts(self) -> bool:
        """Whether every expert has such a parameter."""
        return any("{expert}" in name for name in self.holds)

    def output(self, spec: TensorSpec) -> int:
        """The dimension of a tensor that is the rows of the parameter."""
        return len(spec.dims) - 1 if self.transposed else 0


class ModuleDeclaration(Settings):
    """A module that registers parameters or has an extra state; see frameworks/megatron-core.yaml."""

    place: Place
    name: str
    extra_state: list[Implementation] = Field(default_factory=list)
    bare: bool = False


class Modules(Settings):
    """The modules of a training code: the families it supports, its pipeline layers and its parameters."""

    families: list[str]
    embedding: int
    first_decoder: int
    tied_key: str
    registered: list[ModuleDeclaration] = Field(default_factory=list)
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


def check_stages(architecture: Architecture, pipeline_parallel: int, where: str) -> None:
    """Raise LayoutError if Megatron cannot give every stage of a pipeline as many layers."""
    layers, field = architecture.num_layers, architecture.family.axes["layers"]
    if layers % pipeline_parallel:
        fitting = ", ".join(str(degree) for degree in range(1, layers + 1) if layers % degree == 0)
        raise LayoutError(
            f"{where}: pipeline_parallel {pipeline_parallel}: does not divide {field} {layers}, and Megatron cuts evenly only; "
            f"pipeline_parallel can be {fitting}."
        )


def check_experts(architecture: Architecture, expert_parallel: int, where: str) -> None:
    """Raise LayoutError if the ranks of ``expert_parallel`` cannot have equally many experts."""
    experts = architecture.sizes.get("experts")
    if experts is None and expert_parallel > 1:
        raise LayoutError(
            f"{where}: expert_parallel {expert_parallel}: a {architecture.family.model_type} has no experts; leave it out."
        )
    if experts is not None and experts % expert_parallel:
        fitting = ", ".join(str(degree) for degree in range(1, experts + 1) if experts % degree == 0)
        raise LayoutError(
            f"{where}: expert_parallel {expert_parallel}: does not divide the {experts} experts; it can be {fitting}."
        )


def module_parameters(
    modules: Modules, architecture: Architecture, tensor_parallel: int, tensor_rank: int, vocabulary: int
) -> Mapping[int, tuple[RankParameter, ...]]:
    """The parameters of a tensor rank by pipeline layer, in the order of each module.

    ``vocabulary`` is the number of rows of embedding and head over all ranks, including padding. A tied head has no entry.
    """
    specs = {(spec.layer, spec.local_name): spec for spec in architecture.stored}
    found: dict[int, list[RankParameter]] = {}
    made = _Maker(modules, architecture, tensor_parallel, tensor_rank, vocabulary)
    for layer, decoder, declared in _occurrences(modules, architecture):
        for expert in range(architecture.sizes.get("experts", 0)) if declared.of_experts else (None,):
            names = [(decoder, name.format(expert=expert)) for name in declared.holds]
            held = [specs[name] for name in names if name in specs]
            if len(held) == len(names):
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
        first, cut = held[0], 0 if declared.per is not None else self._cut(declared, held[0])
        if declared.per is not None:
            blocks, shape = self._interleaved(declared, held)
        elif declared.padded:
            blocks, shape = self._vocabulary_rows(first)
        else:
            blocks, shape = self._even_cut(declared, first)
        tied = declared.place == "embedding" and self.architecture.tied
        prefix = f"tied_modules.{self.modules.tied_key}" if tied else str(layer)
        sub_parameters = len(held) if declared.per == "ranks" else 1
        name = f"{prefix}.{declared.name}"
        place = (first, layer, declared.name, cut, declared.padded, sub_parameters)
        return RankParameter(name, shape, blocks, *place)

    def _cut(self, declared: ParameterDeclaration, spec: TensorSpec) -> int | None:
        """The dimension of the parameter that tensor ranks cut."""
        cut = _cut_dimension(spec)
        return len(spec.dims) - 1 - cut if declared.transposed and cut is not None else cut

    def _interleaved(
        self, declared: ParameterDeclaration, held: list[TensorSpec]
    ) -> tuple[tuple[Block, ...], tuple[int, ...]]:
        """Rows of every unit of this rank: within a unit tensor after tensor, and part after part of a tensor."""
        units = self.ranks if declared.per == "ranks" else self.architecture.sizes["kv_heads"]
        blocks, row = list[Block](), 0
        for unit in range(self.rank * units // self.ranks, (self.rank + 1) * units // self.ranks):
            for spec, part in ((spec, part) for spec in held for part in range(declared.parts)):
                output = declared.output(spec)
                size = spec.shape[output] // declared.parts
                bounds = [(0, whole) for whole in spec.shape]
                bounds[output] = (part * size + unit * size // units, part * size + (unit + 1) * size // units)
                blocks.append(Block(spec.name, tuple(bounds), row, transposed=declared.transposed))
                row += blocks[-1].stored_shape[0]
        return tuple(blocks), (row, *blocks[0].stored_shape[1:])

    def _vocabulary_rows(self, spec: TensorSpec) -> tuple[tuple[Block, ...], tuple[int, ...]]:
        local = self.vocabulary // self.ranks
        begin, end = self.rank * local, min((self.rank + 1) * local, spec.shape[0])
        blocks = (Block(spec.name, ((begin, end), (0, spec.shape[1]))),) if begin < end else ()
        return blocks, (local, *spec.shape[1:])

    def _even_cut(self, declared: ParameterDeclaration, spec: TensorSpec) -> tuple[tuple[Block, ...], tuple[int, ...]]:
        bounds, cut = [(0, size) for size in spec.shape], _cut_dimension(spec)
        if cut is not None:
            local = spec.shape[cut] // self.ranks
            bounds[cut] = (self.rank * local, (self.rank + 1) * local)
        block = Block(spec.name, tuple(bounds), transposed=declared.transposed)
        return (block,), block.stored_shape


def _cut_dimension(spec: TensorSpec) -> int | None:
    """The dimension of a tensor that tensor ranks cut."""
    return next((d for d, dim in enumerate(spec.dims) if dim.outer_axis in CUT_AXES), None)
