"""Parameters of transformers' modules that hold a mixture's experts together; checkpoint files name each expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.tensors import TensorSpec
from incr_ds.sharding.blocks import Block


@dataclass(frozen=True)
class JoinedParameter:
    """A parameter [experts, rows, columns] of ``layer`` that holds, for each expert, the tensors of ``members`` stacked by rows.

    ``local_name`` is its name inside the layer. As a matrix [experts * rows, columns] it consists of blocks. An optimizer
    treats all of it like its first tensor. Tensor parallelism cuts every expert's ``size`` neurons alike: along ``dimension``
    of each tensor.
    """

    parameter: str
    layer: int
    local_name: str
    num_experts: int
    members: tuple[TensorSpec, ...]

    @property
    def dimension(self) -> int:
        """The dimension of the neurons in the tensors: 0 in the first matrices, 1 in the second."""
        return next(index for index, dim in enumerate(self.members[0].dims) if dim.outer_axis == "ffn")

    @property
    def size(self) -> int:
        """Neurons of an expert."""
        return self.members[0].shape[self.dimension]

    @property
    def per_expert(self) -> int:
        """Tensors of one expert."""
        return len(self.members) // self.num_experts

    @cached_property
    def whole(self) -> JoinedPart:
        """All of it."""
        return self.part(0, self.size)

    def part(self, start: int, stop: int) -> JoinedPart:
        """What a tensor rank with neurons [start, stop) of every expert holds."""
        found, row = [], 0
        for spec in self.members:
            bounds = [(0, size) for size in spec.shape]
            bounds[self.dimension] = (start, stop)
            found.append(Block(spec.name, tuple(bounds), row))
            row += found[-1].shape[0]
        return JoinedPart((self.num_experts, row // self.num_experts, found[0].shape[1]), tuple(found))


@dataclass(frozen=True)
class JoinedPart:
    """The ``shape`` [experts, rows, columns] and the blocks of a joined parameter on a tensor rank."""

    shape: tuple[int, int, int]
    blocks: tuple[Block, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rows_shape(self) -> tuple[int, int]:
        """[experts * rows, columns]."""
        experts, rows, columns = self.shape
        return experts * rows, columns


def joined_parameters(architecture: Architecture) -> Mapping[str, JoinedParameter]:
    """Parameters of transformers' module that hold tensors of all experts, by name; {} for a dense model."""
    found, num_experts = {}, architecture.sizes.get("experts", 0)
    for layer in range(architecture.num_layers):
        for template, names in architecture.family.joined.items():
            members = tuple(
                architecture.by_name[name.format(layer=layer, expert=expert)]
                for expert in range(num_experts)
                for name in names
            )
            parameter, local_name = template.format(layer=layer), template.partition("{layer}.")[2]
            found[parameter] = JoinedParameter(parameter, layer, local_name, num_experts, members)
    return found
