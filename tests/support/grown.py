"""Grow a model in memory, for tests."""

import torch

from incr_ds.arch.family import families
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.planner import plan_growth
from incr_ds.offline.compare import logical_parts
from incr_ds.testing.memory import drawn_model

# These take the head's size from hidden / heads, so that hidden and heads grow together.
HIDDEN_PER_HEAD = [name for name, family in families().items() if "head_dim" not in family.axes]
# hidden 96 -> 144 is not a multiple, 250 -> 331 shares no factor, 6/3 heads -> 8/4 adds a whole group.
EVERYTHING = {
    "hidden_size": 144,
    "intermediate_size": 331,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 5,
}


AXES = {
    "hidden_size": "hidden",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "num_hidden_layers": "layers",
}


def everything(family):
    """A target with every axis larger, as far as the family's own rules allow."""
    target = dict(EVERYTHING)
    if family in HIDDEN_PER_HEAD:
        target |= {"hidden_size": 208, "num_attention_heads": 13, "num_key_value_heads": 13}
    if families()[family].equal_copies:
        target |= {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 6}
    if "kv_heads" not in families()[family].axes:
        del target["num_key_value_heads"]
    return target


def renamed(family, target):
    """``target`` under the names of the family's own config."""
    return {families()[family].axes.get(AXES.get(field), field): size for field, size in target.items()}


def recipe_of(**content) -> GrowthRecipe:
    return parse_settings(content, GrowthRecipe, "test recipe")


def grown_tensors(source, recipe):
    return GrownTensors(plan_growth(source.architecture, recipe), source)


def whole(grown, name, state="weight"):
    spec = grown.plan.target.by_name[name]
    return grown.read(name, state, tuple((0, size) for size in spec.shape))


def grown_model(grown, dtype=torch.float64):
    model = drawn_model(grown.plan.target, dtype, seed=99)
    for name, part in logical_parts(grown.plan.target, dict(model.named_parameters())).items():
        part.data.copy_(whole(grown, name))
    return model


def relative_difference(first, second, vocab=101, length=17):
    tokens = torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        old, new = first(tokens).logits, second(tokens).logits
    return float((old - new).abs().max() / old.abs().max())


def random_part(size, generator):
    """Start and stop of a part of a dimension."""
    start = int(torch.randint(size, (), generator=generator))
    return start, start + 1 + int(torch.randint(size - start, (), generator=generator))
