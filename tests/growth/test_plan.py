"""The plan: refusals with the nearest sizes that work, slices of the whole, symmetry breaking, determinism."""

import json

import numpy as np
import pytest
import torch
from grown import EVERYTHING, everything, grown_tensors, random_part, recipe_of, renamed, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from incr_ds.arch.family import families
from incr_ds.checkpoint.base import STATES
from incr_ds.errors import ConfigError, GrowthError
from incr_ds.growth.counter import choices, normals, normals_at, shuffled
from incr_ds.growth.depth import METHODS, keeps_order, map_layers
from incr_ds.growth.planner import plan_growth
from incr_ds.growth.width import fitting_heads
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture


@pytest.mark.parametrize(
    ("family", "content", "message"),
    [
        ("llama", {"target": {"hidden_size": 145}}, r"hidden_size: 144 or 150"),
        (
            "llama",
            {"target": {"hidden_size": 128}},
            r"With hidden_size: 128, set num_attention_heads: 16 and num_key_value_h",
        ),
        ("llama", {"target": {"hidden_size": 90}}, r"target\.hidden_size: 90 is smaller than the source's 96"),
        (
            "qwen3",
            {"target": {"hidden_size": 145}, "width": {"hidden": "integer"}},
            r"145 is not a multiple of the source's 96.*nearest sizes that work: 96, 192",
        ),
        ("qwen3", {"target": {"num_attention_heads": 7}}, r"num_key_value_heads that work with 7 query heads: 7"),
        (
            "qwen3",
            {"target": {"num_attention_heads": 6, "num_key_value_heads": 4}},
            r"num_key_value_heads: 4 with 6 query heads.*num_key_value_heads that work with 6 query heads: 3, 6",
        ),
        ("llama", {"target": {"num_hidden_layers": 2}}, r"2 is smaller than the source's 3"),
        ("llama", {"target": {"intermediate_size": 249}}, r"249 is smaller than the source's 250"),
        (
            "llama",
            {"target": {"hidden_sise": 192}},
            r"target\.hidden_sise: not a config field of llama; did you mean hidden_size\?",
        ),
        (
            "llama",
            {"target": {"hidden_act": "gelu"}},
            r"target\.hidden_act: 'gelu' differs from the source's 'silu', and no operator",
        ),
        ("llama", {"target": {"tie_word_embeddings": True}}, r"target\.tie_word_embeddings: True differs"),
        ("llama", {"target": {"hidden_size": "144"}}, r"expected a positive whole number, found '144'"),
        (
            "qwen3",
            {"target": {"hidden_size": 144}, "width": {"hidden": "zero-scaled-eps"}},
            r"qwen3 also uses for its query and key norms; use width\.hidden: zero",
        ),
        (
            "llama",
            {"target": {"num_hidden_layers": 6}, "depth": {"new": "copy"}, "function_preserving": "required"},
            r"function_preserving: required, but depth\.new: copy does not keep the source's .*set function_preserving: pref",
        ),
        ("llama", {"target": {"num_hidden_layers": 5}, "depth": {"method": "solar"}}, r"counts that work: 4, 6\."),
        (
            "llama",
            {"target": {}, "depth": {"method": "map", "map": [0, 3]}},
            r"3 is not a layer of the source; .* 0 to 2",
        ),
        (
            "llama",
            {"target": {"num_hidden_layers": 5}, "depth": {"method": "map", "map": [0, 1, 2, 2]}},
            r"depth\.map lists 4 layers, but target\.num_hidden_layers is 5",
        ),
        ("llama", {"target": {"hidden_size": 96_000_000}}, r"hidden_size: 96,000,000 is more than the 4,194,304 that"),
        ("llama", {"target": {"num_hidden_layers": 99_999}}, r"num_hidden_layers: 99,999 is more than the 16,384 that"),
        (
            "llama",
            {"target": {}, "experts": {"new": "drop"}},
            r"experts: how a dense model becomes a mixture; set target\.model_type",
        ),
        (
            "opt",
            {"target": {"hidden_size": 112, "num_attention_heads": 7, "word_embed_proj_dim": 96}},
            r"target\.word_embed_proj_dim: 96, but it follows hidden_size, which is 112; leave it out",
        ),
        (
            "llama",
            {"target": {"rope_parameters": {"rope_type": "spiral"}}},
            r"rope_parameters: rope_type 'spiral' is not one of default, linear, llama3, yarn, dynamic, longrope",
        ),
        (
            "llama",
            {"target": {"rope_parameters": {"rope_type": "linear"}}},
            r"transformers refuses this llama config: .*Missing required keys.*factor",
        ),
        (
            "gemma3_text",
            {"target": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}},
            r"rope_parameters: factor is not a valid kind of layer; the kinds are full_attention, sliding_attention",
        ),
    ],
)
def test_impossible_requests_are_refused(family: str, content, message: str):
    with pytest.raises(GrowthError, match=f"(?s)^grow\\.yaml: .*{message}"):
        plan_growth(small_architecture(family), recipe_of(**content), "grow.yaml")


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ({"symmetry_breaking": {"method": "noise", "snr_db": float("nan")}}, "snr_db: Input should be a finite number"),
        ({"symmetry_breaking": {"snr_db": -3.0}}, r"snr_db: Input should be greater than or equal to 0, found -3\.0"),
        ({"symmetry_breaking": {"scale": -0.5}}, "scale: Input should be greater than or equal to 0"),
        ({"symmetry_breaking": {"scale": float("inf")}}, "scale: Input should be a finite number"),
        ({"hidden": "constant", "constant": float("nan")}, "width.constant: Input should be a finite number"),
        ({"hidden": "random", "std": -0.1}, "width.std: Input should be greater than 0"),
    ],
)
def test_numbers_that_no_weight_can_come_of(width, message: str):
    with pytest.raises(ConfigError, match=message):
        recipe_of(target={"hidden_size": 192}, width=width)


@pytest.mark.parametrize(
    ("method", "old", "new", "layers", "is_new"),
    [
        ("interleave", 3, 5, [0, 0, 1, 1, 2], [0, 1, 0, 1, 0]),
        ("interleave", 2, 4, [0, 0, 1, 1], [0, 1, 0, 1]),
        ("stack", 3, 5, [0, 1, 2, 0, 1], [0, 0, 0, 1, 1]),
        ("stack", 2, 2, [0, 1], [0, 0]),
    ],
)
def test_layer_maps(method, old, new, layers, is_new):
    found = map_layers(method, old, new)
    assert [layer.layer for layer in found] == layers
    assert [int(layer.is_new) for layer in found] == is_new


def test_published_layer_maps():
    """The examples of the papers: SOLAR 32 to 48, LLaMA-Pro 32 to 40, MIDAS' middle block, MSLT's top layers."""
    maps = {method: [layer.layer for layer in map_layers(method, 32, new)] for method, new in
            (("solar", 48), ("expand", 40), ("midas", 40), ("append", 38))}  # fmt: skip
    assert maps["solar"] == [*range(24), *range(8, 32)]
    assert maps["expand"] == [layer for layer in range(32) for _ in range(2 if layer % 4 == 3 else 1)]
    assert maps["midas"] == [*range(20), *range(12, 32)]
    assert maps["append"] == [*range(32), *range(26, 32)]


def test_prepended_layers_are_the_new_ones():
    found = map_layers("prepend", 3, 5)
    assert [(layer.layer, layer.is_new) for layer in found] == [
        (0, True),
        (1, True),
        (0, False),
        (1, False),
        (2, False),
    ]


@settings(max_examples=60, deadline=None)
@given(method=st.sampled_from(sorted(METHODS)), old=st.integers(1, 40), added=st.integers(0, 50))
def test_every_method_keeps_the_source_in_order(method, old, added):
    try:
        found = map_layers(method, old, old + added)
    except GrowthError:
        assert method == "solar"
        return
    assert len(found) == old + added and keeps_order(found, old)
    assert all(layer.copies == sum(other.layer == layer.layer for other in found) for layer in found)


@pytest.mark.parametrize(
    ("hidden", "new", "breaking"),
    [
        ("auto", "copy", "per-element"),
        ("zero", "zero-output", "none"),
        ("lemon", "copy", "noise"),
        ("fpi", "copy", "diagonal"),
        ("random", "constant", "per-element"),
    ],
)
@pytest.mark.parametrize("family", sorted(families()))
def test_any_slice_is_the_slice_of_the_whole(family: str, hidden, new, breaking):
    """Parts of weights and moments, cut along rows and columns at once: as tensor and pipeline ranks cut them, and finer."""
    architecture = small_architecture(family, tie_word_embeddings=True)
    source = model_checkpoint(architecture, drawn_model(architecture, torch.float32), with_moments=True)
    units = {"new": new}
    width = {"hidden": hidden, "ffn": units, "heads": units, "symmetry_breaking": {"method": breaking}}
    grown = grown_tensors(source, recipe_of(target=renamed(family, everything(family)), width=width))
    generator = torch.Generator().manual_seed(1)
    for spec in grown.plan.target.stored:
        bounds = tuple(random_part(size, generator) for size in spec.shape)
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            expected = whole(grown, spec.name, state)[tuple(slice(*part) for part in bounds)]
            assert torch.equal(grown.read(spec.name, state, bounds), expected), f"{spec.name}, {state}"


def test_copies_differ_and_their_shares_sum_to_one():
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture))
    width = {"hidden": "integer", "symmetry_breaking": {"scale": 0.5, "seed": 3}}
    grown = grown_tensors(source, recipe_of(target={"hidden_size": 192}, width=width))
    name = "model.layers.1.mlp.up_proj.weight"
    halves = whole(grown, name).reshape(250, 2, 96)
    assert torch.allclose(halves.sum(1), source.read(name), rtol=0, atol=1e-15)
    shares = halves[:, 0] / source.read(name)
    assert abs(float(shares.mean()) - 0.5) < 0.01
    assert abs(float(shares.std()) - 0.25) < 0.01  # scale 0.5, relative to the even share 1/2


def test_the_seed_decides_and_nothing_else():
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture))
    name = "model.layers.0.mlp.down_proj.weight"

    def grow(seed):
        width = {"ffn": {"new": "copy"}, "symmetry_breaking": {"seed": seed}}
        return whole(grown_tensors(source, recipe_of(target={"intermediate_size": 500}, width=width)), name)

    assert torch.equal(grow(1), grow(1))
    assert not torch.equal(grow(1), grow(2))


@settings(deadline=None)
@given(first=st.integers(0, 5000), count=st.integers(1, 300), seed=st.integers(0, 2**40))
def test_random_numbers_are_addressed_by_element(first, count, seed):
    stream = normals(seed, "tensor", 0, first + count)
    assert (normals(seed, "tensor", first, count) == stream[first:]).all()


@given(st.integers(0, 2**32), st.integers(0, 9), st.lists(st.booleans(), min_size=1, max_size=6), st.data())
def test_wanted_elements_are_those_of_the_whole_stream(seed, first_row, rows, data):
    columns = data.draw(st.lists(st.booleans(), min_size=1, max_size=5))
    wanted = np.array(rows)[:, None] & np.array(columns)[None, :]
    width = len(columns)
    whole = normals(seed, "tensor", first_row * width, wanted.size).reshape(wanted.shape)
    assert (normals_at(seed, "tensor", first_row, wanted) == np.where(wanted, whole, 0.0)).all()


def test_drawn_maps_are_the_same_everywhere():
    """Philox's words are fixed by its publication; numpy may change what its generators make of theirs."""
    assert choices(3, "hidden/fpi", 8, 96).tolist() == [71, 63, 1, 16, 26, 22, 89, 20]
    assert shuffled(3, "layers.0.experts.1/dropped", 8).tolist() == [0, 3, 6, 4, 1, 2, 5, 7]
    many = choices(1, "a", 100_000, 10)
    assert np.abs(np.bincount(many, minlength=10) - 10_000).max() < 400
    assert sorted(shuffled(1, "a", 1000)) == list(range(1000))


def test_random_numbers_are_standard_normal_and_independent_between_tensors():
    first, second = normals(5, "a", 0, 200_000), normals(5, "b", 0, 200_000)
    assert abs(first.mean()) < 0.01 and abs(first.std() - 1) < 0.01
    assert abs((first**4).mean() - 3) < 0.1
    assert abs((first * second).mean()) < 0.01


def test_the_plan_is_json_and_repeats():
    architecture = small_architecture("qwen3")
    text = plan_growth(architecture, recipe_of(target=EVERYTHING)).to_json()
    assert text == plan_growth(architecture, recipe_of(target=EVERYTHING)).to_json()
    content = json.loads(text)
    assert content["target_config"]["hidden_size"] == 144
    assert content["axes"]["hidden"]["method"] == "isometric"
    sources = {tensor["name"]: tensor["source"] for tensor in content["tensors"]}
    assert sources["model.layers.3.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"
    assert {tensor["name"] for tensor in content["tensors"] if tensor["start"] == "zero"} == {
        f"model.layers.{layer}.{name}.weight" for layer in (1, 3) for name in ("self_attn.o_proj", "mlp.down_proj")
    }


def test_more_than_four_times_the_parameters_is_said():
    source, warning = small_architecture("llama"), "times; published gains are for 2 to 4 times in one step"
    for layers, expected in ((11, []), (16, ["grows 5.0 " + warning])):
        plan = plan_growth(source, recipe_of(target={"num_hidden_layers": layers}))
        assert [note for note in plan.notes if "published gains" in note] == expected
        assert plan.function_preserving


def test_per_layer_fields_follow_the_layer_map():
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    architecture = small_architecture("qwen3", layer_types=kinds, use_sliding_window=True, sliding_window=16)
    plan = plan_growth(architecture, recipe_of(target={"num_hidden_layers": 5}))
    assert plan.target.config["layer_types"] == [kinds[layer] for layer in (0, 0, 1, 1, 2)]


@pytest.mark.default_run("values")
@pytest.mark.parametrize("optimizer", ["rescale", "copy", "reset-new", "reset"])
@pytest.mark.parametrize("family", sorted(families()))
def test_unchanged_tensors_are_what_the_arithmetic_gives(family: str, optimizer):
    """A growth of the FFN and of the depth leaves norms, attention and embeddings of old layers as they are."""
    architecture = small_architecture(family)
    source = model_checkpoint(architecture, drawn_model(architecture, torch.float32), with_moments=True)
    target = renamed(family, {"intermediate_size": 331, "num_hidden_layers": 5})
    grown = grown_tensors(source, recipe_of(target=target, optimizer=optimizer, depth={"new": "copy"}))
    unchanged, tensors = grown.plan.unchanged, grown.plan.tensors
    old = {name for name, tensor in tensors.items() if not tensor.new_layer}
    assert unchanged <= old and any(tensor.new_layer for tensor in tensors.values())
    assert not any("ffn" in dim.named_axes for name in unchanged for dim in tensors[name].target.dims)
    assert len(unchanged) > len(old) / 2
    calculated = grown_tensors(source, grown.plan.recipe)
    vars(calculated.plan)["unchanged"] = frozenset()
    for name in tensors:
        for state in STATES:
            assert torch.equal(whole(grown, name, state), whole(calculated, name, state)), (name, state)


def test_where_nothing_grows_all_is_unchanged():
    architecture = small_architecture("llama")
    plan = plan_growth(architecture, recipe_of(target={}))
    assert plan.unchanged == set(plan.tensors)
    halved = plan_growth(
        architecture, recipe_of(target={"num_hidden_layers": 6}, depth={"method": "stack", "new": "halved"})
    )
    writers = {name for name, tensor in halved.tensors.items() if tensor.scale != 1.0}
    assert writers and not writers & halved.unchanged


SMOLLM2 = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"hidden_size": 768}, r"With hidden_size: 768, set num_attention_heads: 12 and num_key_value_heads: 4\."),
        (
            {"hidden_size": 640, "num_attention_heads": 10, "num_key_value_heads": 4},
            r"num_attention_heads that work with 4 kv heads: 12, 16, 20, 24, \.\.\.; "
            r"num_key_value_heads that work with 10 query heads: 10\.",
        ),
        ({"hidden_size": 640}, r"With hidden_size: 640, set num_attention_heads: 10 and num_key_value_heads: 10\."),
        ({"hidden_size": 770}, r"Nearest sizes that work: hidden_size: 765 or 774\."),
    ],
)
def test_head_counts_that_a_new_hidden_size_asks_for(target, message: str):
    """SmolLM2-135M: 9 query heads of 64 in 3 groups."""
    source = small_architecture("llama", **SMOLLM2)
    with pytest.raises(GrowthError, match=message):
        plan_growth(source, recipe_of(target=target))


def test_the_head_counts_that_are_named_do_work():
    source = small_architecture("llama", **SMOLLM2)
    for heads, kv_heads in ((12, 4), (16, 4), (20, 4), (24, 4), (10, 10)):
        target = {"hidden_size": 64 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
        assert plan_growth(source, recipe_of(target=target)).function_preserving
    assert fitting_heads((9, 3), 4) == [12, 16, 20, 24] and fitting_heads((9, 3), 3)[0] == 9
    assert fitting_heads((9, 3), 2) == [] and fitting_heads((8, 8), 12) == [12, 24, 36, 48]
