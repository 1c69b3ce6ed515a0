"""Experts in one grouped product compute what they compute one after the other."""

import pytest
import torch

from incr_ds.errors import ConfigError
from incr_ds.model.layers import LayerFactory
from incr_ds.model.plain import LanguageModel
from incr_ds.model.tensor_parallel import TensorRanks
from incr_ds.model.weights import CheckpointWeights
from incr_ds.sharding.expert_products import grouped_experts
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.memory import small_architecture

# Hidden 96, experts of 250 neurons: rows of 250 fp32 numbers are not whole multiples of 16 bytes, and of 252 they are.
NEURONS = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}


def architecture_of(family, neurons=252, **changes):
    return small_architecture(family, **{NEURONS[family]: neurons}, **changes)


def model_of(checkpoint, experts, recompute):
    factory = LayerFactory(
        checkpoint.architecture,
        TensorRanks(None, 0, 1),
        CheckpointWeights(checkpoint),
        torch.float32,
        torch.device("cpu"),
        "sdpa",
        recompute,
        router_loss=0.3,
        experts=experts,
    )
    assert factory.config._experts_implementation == {"grouped": "grouped_mm", "eager": "eager"}[experts]
    return LanguageModel(factory, range(checkpoint.architecture.num_layers + 3))


@pytest.mark.parametrize("family", NEURONS)
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_those_of_eager(family: str, recompute):
    checkpoint = drawn_checkpoint(architecture_of(family))
    ids = torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(0))
    found = {}
    for experts in ("eager", "grouped"):
        model = model_of(checkpoint, experts, recompute).train()
        loss = model(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        found[experts] = loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(found["grouped"][0], found["eager"][0], rtol=1e-6, atol=0)
    for name, expected in found["eager"][1].items():
        torch.testing.assert_close(found["grouped"][1][name], expected, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("neurons", "tensor_parallel", "element", "grouped"),
    [
        (252, 1, 4, True),
        (250, 1, 4, False),
        (252, 1, 2, False),
        (256, 1, 2, True),
        (256, 2, 4, True),
        (264, 2, 4, True),  # 132 on each rank
        (260, 2, 4, False),  # 130 on each rank
        (252, 3, 4, True),
        (256, 1, 8, False),
    ],
)
def test_auto_groups_where_every_tensor_rank_can(neurons, tensor_parallel, element, grouped):
    architecture = architecture_of("mixtral", neurons)
    assert grouped_experts("auto", architecture, tensor_parallel, element) is grouped
    assert grouped_experts("eager", architecture, tensor_parallel, element) is False


@pytest.mark.parametrize(
    ("family", "changes", "ranks", "element", "message"),
    [
        ("mixtral", {"intermediate_size": 250}, 1, 4, "intermediate_size 250 is not a multiple of 4, and rows of numbers of 4"),
        ("mixtral", {"intermediate_size": 260}, 2, 4, "intermediate_size 130 on a tensor rank of 2 is not a multiple of 4"),
        ("qwen3_moe", {"hidden_size": 100, "moe_intermediate_size": 256}, 1, 2, "hidden_size 100 is not a multiple of 8"),
        ("mixtral", {}, 1, 8, "grouped products have no numbers of 8 bytes"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_grouped_are_named(family: str, changes, ranks, element, message: str):
    with pytest.raises(ConfigError, match=rf"model\.experts: grouped: {message}.*; set auto or eager"):
        grouped_experts("grouped", small_architecture(family, **changes), ranks, element)


@pytest.mark.parametrize("products", ["grouped", "eager"])
def test_a_dense_model_has_no_experts(products):
    with pytest.raises(ConfigError, match=rf"model\.experts: {products}: a llama has no experts, .*; remove it"):
        grouped_experts(products, small_architecture("llama"), 1, 4)
    assert not grouped_experts("auto", small_architecture("llama"), 1, 4)
