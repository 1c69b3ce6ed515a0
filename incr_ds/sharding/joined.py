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

    ``local_name`` is its name inside the layer. As a matrix [experts * rows, columns] it consists of ``blocks``. An optimizer
    and tensor parallelism treat all of it like its first tensor.
    """

    parameter: str
    layer: int
    local_name: str
    num_experts: int
    members: tuple[TensorSpec, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """[experts, rows, columns]."""
        rows = sum(spec.shape[0] for spec in self.members)
        return (self.num_experts, rows // self.num_experts, self.members[0].shape[1])

    @property
    def rows_shape(self) -> tuple[int, int]:
        """[experts * rows, columns]."""
        experts, rows, columns = self.shape
        return experts * rows, columns

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """Every tensor, placed at its first row in the matrix."""
        found, row = [], 0
        for spec in self.members:
            found.append(Block(spec.name, ((0, spec.shape[0]), (0, spec.shape[1])), row))
            row += spec.shape[0]
        return tuple(found)


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
