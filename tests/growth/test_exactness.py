"""Exact operators keep the source's logits: to 1e-12 in fp64, to 1e-6 through unmodified transformers."""

import pytest
import torch
from grown import grown_model, grown_tensors, recipe_of, relative_difference, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incr_ds.arch.family import families
from incr_ds.errors import GrowthError, IncrError
from incr_ds.growth.depth import METHODS
from incr_ds.growth.planner import plan_growth
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture

FAMILIES = sorted(families())
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
LAYER_NORM = [name for name, family in families().items() if family.norm == "layer"]
# These take the head's size from hidden / heads, so that hidden and heads grow together.
HIDDEN_PER_HEAD = [name for name, family in families().items() if "head_dim" not in family.axes]
# Their eps serves other norms too, or is not in the config.
SHARED_EPS = ("olmo2", "gemma3_text", "qwen3", "opt")
OTHERS = [name for name in FAMILIES if name not in LLAMA_LIKE]
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
    if family == "olmo2":
        target |= {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 6}
    if "kv_heads" not in families()[family].axes:
        del target["num_key_value_heads"]
    return target


def difference(family, target, tied=False, **recipe):
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    architecture = small_architecture(family, tie_word_embeddings=tied, **biases)
    source = drawn_model(architecture)
    target = {architecture.family.axes.get(AXES.get(field), field): size for field, size in target.items()}
    grown = grown_tensors(model_checkpoint(architecture, source), recipe_of(target=target, **recipe))
    assert grown.plan.exact
    return relative_difference(source, grown_model(grown))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("new", ["zero-output", "copy"])
def test_everything_at_once(fp64_norms, family, tied, new):
    width = {"ffn": {"new": new}, "heads": {"new": "copy" if family == "olmo2" else new}}
    assert difference(family, everything(family), tied, width=width) <= 1e-12


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("hidden", ["auto", "isometric", "zero", "zero-scaled-eps", "mean", "integer"])
@pytest.mark.parametrize("family", OTHERS)
def test_hidden_of_every_other_family(fp64_norms, family, hidden, tied):
    """Each method on each family: kept to 1e-12, refused, or said to be inexact (and then it is)."""
    architecture = small_architecture(family, tie_word_embeddings=tied)
    source = drawn_model(architecture)
    size = 288 if hidden == "integer" else {"gemma2": 150, "gemma3_text": 150}.get(family, 112)
    if family == "olmo2":
        size = 192
    axes = architecture.family.axes
    target = {axes["hidden"]: size}
    if family in HIDDEN_PER_HEAD:
        target |= {axes[axis]: size // 16 for axis in ("heads", "kv_heads") if axis in axes}
    if family == "olmo2":
        target[axes["kv_heads"]] = 6
    new = "copy" if family == "olmo2" else "zero-output"
    recipe = recipe_of(target=target, width={"hidden": hidden, "heads": {"new": new}})
    if (hidden == "mean" and family not in LAYER_NORM) or (hidden == "zero-scaled-eps" and family in SHARED_EPS):
        with pytest.raises(GrowthError, match=f"width.hidden: {hidden}|pads for LayerNorm"):
            grown_tensors(model_checkpoint(architecture, source), recipe)
        return
    grown = grown_tensors(model_checkpoint(architecture, source), recipe)
    found = relative_difference(source, grown_model(grown))
    assert found <= 1e-12 if grown.plan.exact else found > 1e-6, grown.plan.inexact
    if family in LAYER_NORM:
        assert grown.plan.exact == (hidden in ("auto", "mean", "integer"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("method", "hidden"), [("integer", 192), ("integer", 288), ("isometric", 102), ("isometric", 222), ("zero", 144)]
)
@pytest.mark.parametrize("breaking", ["per-element", "none"])
def test_hidden(fp64_norms, method, hidden, tied, breaking):
    width = {"hidden": method, "symmetry_breaking": {"method": breaking}}
    assert difference("llama", {"hidden_size": hidden}, tied, width=width) <= 1e-12


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_zero_padding_with_scaled_eps(fp64_norms, family, tied):
    assert difference(family, {"hidden_size": 144}, tied, width={"hidden": "zero-scaled-eps"}) <= 1e-12


# The source has 6 query and 3 kv heads: groups of 2.
@pytest.mark.parametrize("heads", [(6, 6), (9, 3), (12, 3), (8, 4), (12, 6), (12, 12), (10, 5), (15, 5), (18, 9)])
@pytest.mark.parametrize("new", ["zero-output", "copy"])
def test_heads(fp64_norms, heads, new):
    target = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    assert difference("qwen3", target, width={"heads": {"new": new}}) <= 1e-12


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("new", ["zero-output", "identity"])
@pytest.mark.parametrize("layers", [4, 6, 7])
def test_depth(fp64_norms, method, new, layers):
    layers = 4 if method == "solar" and layers == 7 else layers
    assert difference("llama", {"num_hidden_layers": layers}, depth={"method": method, "new": new}) <= 1e-12


def test_a_given_layer_map_is_exact_if_it_keeps_every_layer_in_order(fp64_norms):
    target = {"hidden_size": 144}
    assert difference("qwen2", target, depth={"method": "map", "map": [0, 0, 1, 0, 2, 2]}) <= 1e-12
    architecture = small_architecture("qwen2")
    plan = plan_growth(architecture, recipe_of(target=target, depth={"method": "map", "map": [0, 2, 0, 2]}))
    assert plan.target.num_layers == 4 and not plan.exact
    assert set(plan.dropped) == {spec.name for spec in architecture.stored if spec.layer == 1}
    assert "depth.map leaves layers out or changes their order" in plan.notes[0]
    assert not plan_growth(architecture, recipe_of(target={}, depth={"method": "map", "map": [1, 0, 2]})).exact


def test_halved_layers_write_half_as_strongly():
    """Twins of layer 1 share its output between them: each writes half, and the moved logits stay near the source's."""
    architecture = small_architecture("llama")
    source = drawn_model(architecture)
    checkpoint = model_checkpoint(architecture, source)
    depth = {"method": "map", "map": [0, 1, 1, 2]}
    grown = {
        new: grown_tensors(checkpoint, recipe_of(target={}, depth={**depth, "new": new})) for new in ("halved", "copy")
    }
    for layer, factor in ((0, 1.0), (1, 0.5), (2, 0.5), (3, 1.0)):
        old = min(layer, 1) if layer < 3 else 2
        for name, part in (("self_attn.o_proj", factor), ("mlp.down_proj", factor), ("mlp.up_proj", 1.0)):
            expected = part * checkpoint.read(f"model.layers.{old}.{name}.weight")
            assert torch.equal(whole(grown["halved"], f"model.layers.{layer}.{name}.weight"), expected)
    apart = {new: relative_difference(source, grown_model(tensors)) for new, tensors in grown.items()}
    assert 1e-4 < apart["halved"] < apart["copy"]


@pytest.mark.parametrize("new", ["zero-output", "identity"])
@pytest.mark.parametrize("family", OTHERS)
def test_depth_of_every_other_family(fp64_norms, family, new):
    assert difference(family, {"num_hidden_layers": 5}, depth={"new": new}) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_growing_by_nothing_is_the_identity(fp64_norms, family):
    architecture = small_architecture(family)
    source = model_checkpoint(architecture, drawn_model(architecture), with_moments=True)
    grown = grown_tensors(source, recipe_of(target={}))
    for spec in architecture.stored:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            bounds = tuple((0, size) for size in spec.shape)
            assert torch.equal(grown.read(spec.name, state, bounds), source.read(spec.name, state))


def test_two_growths_in_a_row_keep_the_function(fp64_norms):
    architecture = small_architecture("qwen3", tie_word_embeddings=True)
    model = drawn_model(architecture)
    first = grown_tensors(model_checkpoint(architecture, model), recipe_of(target=EVERYTHING))
    middle = grown_model(first)
    target = {"hidden_size": 233, "num_hidden_layers": 6, "intermediate_size": 400, "num_attention_heads": 12}
    second = grown_tensors(model_checkpoint(first.plan.target, middle), recipe_of(target=target))
    assert relative_difference(model, grown_model(second)) <= 1e-12


def test_unmodified_transformers():
    """Their RMSNorm casts to fp32; nothing else stands between the models."""
    assert difference("qwen3", EVERYTHING) <= 1e-6


def test_fp32_weights():
    architecture = small_architecture("llama")
    source = drawn_model(architecture, torch.float32)
    grown = grown_tensors(model_checkpoint(architecture, source), recipe_of(target=EVERYTHING))
    assert relative_difference(source, grown_model(grown, torch.float32)) <= 1e-5


def test_copied_layers_change_the_function_and_say_so(fp64_norms):
    architecture = small_architecture("llama")
    source = drawn_model(architecture)
    recipe = recipe_of(target={"num_hidden_layers": 6}, depth={"method": "stack", "new": "copy"})
    grown = grown_tensors(model_checkpoint(architecture, source), recipe)
    assert not grown.plan.exact
    assert "does not keep the source's function" in grown.plan.notes[0]
    assert relative_difference(source, grown_model(grown)) > 1e-3


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hidden=st.integers(96, 230),
    ffn=st.integers(250, 600),
    heads=st.integers(6, 18),
    kv_heads=st.integers(3, 18),
    layers=st.integers(3, 7),
    method=st.sampled_from(["auto", "isometric", "zero"]),
    new=st.sampled_from(["zero-output", "copy"]),
    depth=st.sampled_from(sorted(METHODS)),
    family=st.sampled_from(LLAMA_LIKE),
    tied=st.booleans(),
)
def test_any_shape_is_exact_or_refused(
    fp64_norms, hidden, ffn, heads, kv_heads, layers, method, new, depth, family, tied
):
    target = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
    }
    width = {"hidden": method, "ffn": {"new": new}, "heads": {"new": new}}
    try:
        found = difference(family, target, tied, width=width, depth={"method": depth})
    except IncrError as refusal:
        assert "work" in str(refusal) or "can be" in str(refusal) or "Nearest" in str(refusal)
        return
    assert found <= 1e-12
