"""Grow a model in memory, for tests."""

import torch

from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.planner import plan_growth
from incr_ds.testing.memory import drawn_model


def recipe_of(**content) -> GrowthRecipe:
    return parse_settings(content, GrowthRecipe, "test recipe")


def grown_tensors(source, recipe):
    return GrownTensors(plan_growth(source.architecture, recipe), source)


def whole(grown, name, state="weight"):
    spec = grown.plan.target.by_name[name]
    return grown.read(name, state, tuple((0, size) for size in spec.shape))


def grown_model(grown, dtype=torch.float64):
    model = drawn_model(grown.plan.target, dtype, seed=99)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(whole(grown, name))
    return model


def relative_difference(first, second, vocab=101, length=17):
    tokens = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        old, new = first(tokens).logits, second(tokens).logits
    return float((old - new).abs().max() / old.abs().max())
