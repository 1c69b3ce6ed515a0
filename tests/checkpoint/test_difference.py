"""Where two checkpoints differ, and nothing else."""

import math

import pytest
import torch

from incr_ds.checkpoint.difference import Difference, differences
from incr_ds.cli.tables import component_sizes
from incr_ds.testing.checkpoint import MemoryCheckpoint
from incr_ds.testing.pico import pico_architecture


def tensors(architecture, states=("weight",)):
    generator = torch.Generator().manual_seed(3)
    return {
        state: {spec.name: torch.randn(spec.shape, generator=generator) for spec in architecture.stored}
        for state in states
    }


def test_equal_checkpoints_do_not_differ():
    architecture = pico_architecture(tied=True)
    first, second = (MemoryCheckpoint(architecture, tensors(architecture, ("weight", "exp_avg"))) for _ in range(2))
    assert list(differences(first, second)) == []


@pytest.mark.parametrize("portion", [1, 1 << 20])
def test_changed_elements_are_counted(monkeypatch: pytest.MonkeyPatch, portion):
    monkeypatch.setattr("incr_ds.checkpoint.difference._ELEMENTS", portion)
    architecture = pico_architecture()
    first, second = tensors(architecture), tensors(architecture)
    changed = second["weight"]["model.layers.1.mlp.up_proj.weight"]
    changed[49, 23] += 0.5
    changed[0, 1] -= 0.25
    found = list(differences(MemoryCheckpoint(architecture, first), MemoryCheckpoint(architecture, second)))
    assert [(item.name, item.state, item.what, item.elements) for item in found] == [
        ("model.layers.1.mlp.up_proj.weight", "weight", "values", 2)
    ]
    assert abs(found[0].largest - 0.5) < 1e-6
    changed[7, 7] = math.nan
    (found,) = differences(MemoryCheckpoint(architecture, first), MemoryCheckpoint(architecture, second))
    assert found.elements == 3 and math.isnan(found.largest)


def test_shapes_names_and_states():
    small, large = pico_architecture(), pico_architecture(intermediate_size=51, num_hidden_layers=4)
    first = MemoryCheckpoint(small, tensors(small, ("weight", "exp_avg")))
    second = MemoryCheckpoint(large, tensors(large))
    found = list(differences(first, second))
    assert Difference("model.layers.2.mlp.down_proj.weight", "weight", "shape [24, 50] and [24, 51]") in found
    assert Difference("model.layers.3.mlp.down_proj.weight", "weight", "only in the second") in found
    assert found[-1] == Difference("*", "exp_avg", "only in the first")


def test_components_add_up():
    architecture = pico_architecture("qwen3", attention_bias=True)
    sizes = component_sizes(architecture)
    assert sum(sizes.values()) == architecture.num_parameters
    assert sizes["embedding"] == sizes["head"] == 101 * 24
    assert sizes["feed-forward"] == 3 * 3 * 24 * 50
    assert sizes["norms"] == 24 + 3 * (2 * 24 + 2 * 8)
