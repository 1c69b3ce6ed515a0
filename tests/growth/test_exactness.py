"""Exact operators keep the source's logits: to 1e-12 in fp64, to 1e-6 through unmodified transformers."""

import pytest
import torch
from grown import (
    AXES,
    EVERYTHING,
    HIDDEN_PER_HEAD,
    everything,
    grown_model,
    grown_tensors,
    recipe_of,
    relative_difference,
    renamed,
    whole,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incr_ds.arch.family import families
from incr_ds.errors import GrowthError, IncrError
from incr_ds.growth.depth import METHODS
from incr_ds.growth.planner import plan_growth
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture

FAMILIES = sorted(families())
EQUAL = [name for name, family in families().items() if family.equal_copies]
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
LAYER_NORM = [name for name, family in families().items() if family.norm == "layer"]
# Their eps serves other norms too, or is not in the config.
SHARED_EPS = ("olmo2", "olmo3", "gemma3_text", "qwen3", "opt")
OTHERS = [name for name in FAMILIES if name not in LLAMA_LIKE]
# Growth treats these as others. In a default run, test_everything_at_once still has them.
ALIKE = ("smollm3", "ministral3", "stablelm", "starcoder2", "olmo3")


def unlike(names):
    """``names``, those that are like others in slow runs only."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in names]


def difference(family, target, tied=False, length=17, **recipe):
    biases = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    architecture = small_architecture(family, tie_word_embeddings=tied, **biases)
    source = drawn_model(architecture)
    grown = grown_tensors(model_checkpoint(architecture, source), recipe_of(target=renamed(family, target), **recipe))
    assert grown.plan.function_preserving
    return relative_difference(source, grown_model(grown), length=length)


@pytest.mark.default_run("pairs")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("new", ["zero-output", "copy"])
def test_everything_at_once(fp64_norms, family: str, tied: bool, new):
    width = {"ffn": {"new": new}, "heads": {"new": "copy" if family in EQUAL else new}}
    assert difference(family, everything(family), tied, width=width) <= 1e-12


@pytest.mark.default_run("pairs")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("hidden", ["auto", "isometric", "zero", "zero-scaled-eps", "mean", "centred", "integer"])
@pytest.mark.parametrize("family", unlike(OTHERS))
def test_hidden_of_every_other_family(fp64_norms, family: str, hidden, tied: bool):
    """Each method on each family: kept to 1e-12, refused, or said to be inexact (and then it is)."""
    architecture = small_architecture(family, tie_word_embeddings=tied)
    source = drawn_model(architecture)
    size = 288 if hidden == "integer" else {"gemma2": 150, "gemma3_text": 150}.get(family, 112)
    if family in EQUAL:
        size = 192
    axes = architecture.family.axes
    target = {axes["hidden"]: size}
    if family in HIDDEN_PER_HEAD:
        target |= {axes[axis]: size // 16 for axis in ("heads", "kv_heads") if axis in axes}
    if family in EQUAL:
        target[axes["kv_heads"]] = 6
    new = "copy" if family in EQUAL else "zero-output"
    recipe = recipe_of(target=target, width={"hidden": hidden, "heads": {"new": new}})
    if (hidden in ("mean", "centred") and family not in LAYER_NORM) or (
        hidden == "zero-scaled-eps" and family in SHARED_EPS
    ):
        with pytest.raises(GrowthError, match=f"width.hidden: {hidden}|pads for LayerNorm"):
            grown_tensors(model_checkpoint(architecture, source), recipe)
        return
    grown = grown_tensors(model_checkpoint(architecture, source), recipe)
    found = relative_difference(source, grown_model(grown))
    assert found <= 1e-12 if grown.plan.function_preserving else found > 1e-6, grown.plan.inexact
    if family in LAYER_NORM:
        assert grown.plan.function_preserving == (
            hidden in ("auto", "mean", "integer") or (hidden == "centred" and not tied)
        )


@pytest.mark.default_run("pairs")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("method", "hidden"), [("integer", 192), ("integer", 288), ("isometric", 102), ("isometric", 222), ("zero", 144)]
)
@pytest.mark.parametrize("breaking", ["per-element", "none"])
def test_hidden(fp64_norms, method, hidden, tied: bool, breaking):
    width = {"hidden": method, "symmetry_breaking": {"method": breaking}}
    assert difference("llama", {"hidden_size": hidden}, tied, width=width) <= 1e-12


@pytest.mark.parametrize("hidden", [192, 222])
@pytest.mark.parametrize("breaking", ["per-element", "diagonal"])
def test_interleaved_copies(fp64_norms, hidden, breaking):
    """Each position beside its copies; 222 are two or three of each."""
    width = {"order": "interleave", "ffn": {"new": "copy"}, "symmetry_breaking": {"method": breaking}}
    assert difference("llama", {"hidden_size": hidden, "intermediate_size": 500}, True, width=width) <= 1e-12
    plan = plan_growth(small_architecture("llama"), recipe_of(target={"hidden_size": hidden}, width=width))
    index = plan.axes["hidden"].index
    assert index[:3] == ((0, 0, 1) if hidden == 192 else (0, 0, 0)) and list(index) == sorted(index)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("breaking", ["per-element", "diagonal", "none"])
def test_drawn_copies(fp64_norms, family: str, breaking):
    """Drawn copies of neurons, heads and isometric positions: first every old one, then any, repeatedly or not at all."""
    width = {"order": "drawn", "ffn": {"new": "copy"}, "heads": {"new": "copy"}}
    width["symmetry_breaking"] = {"method": breaking, "seed": 3}
    sizes = {"ffn": 700, "hidden": 225, "heads": 15, "kv_heads": 5}
    if family != "llama":  # whose heads' size is hidden / heads
        sizes = {"ffn": 700, "hidden": 192, "heads": 12}
    fields = small_architecture(family).family.axes
    target = {fields[axis]: size for axis, size in sizes.items()}
    assert difference(family, target, True, width=width) <= 1e-12
    neurons = plan_growth(small_architecture(family), recipe_of(target=target, width=width)).axes["ffn"].index
    assert neurons[:250] == tuple(range(250)) and 1 < len(set(neurons[250:])) < 250


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_zero_padding_with_scaled_eps(fp64_norms, family: str, tied: bool):
    assert difference(family, {"hidden_size": 144}, tied, width={"hidden": "zero-scaled-eps"}) <= 1e-12


# The source has 6 query and 3 kv heads: groups of 2.
@pytest.mark.parametrize("heads", [(6, 6), (9, 3), (12, 3), (8, 4), (12, 6), (12, 12), (10, 5), (15, 5), (18, 9)])
@pytest.mark.parametrize("new", ["zero-output", "copy"])
def test_heads(fp64_norms, heads, new):
    target = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    assert difference("qwen3", target, width={"heads": {"new": new}}) <= 1e-12


# 6 query heads in groups of 2 under 3 key heads, which stay or double; a head's size is hidden / heads.
@pytest.mark.parametrize("heads", [(9, 3), (12, 3), (15, 3), (12, 6), (18, 6)])
@pytest.mark.parametrize("new", ["zero-output", "copy"])
@pytest.mark.parametrize("family", EQUAL)
def test_query_heads_under_one_norm(fp64_norms, family: str, new, heads):
    """OLMo-2's norm goes over all query heads at once: copies are scaled to keep its mean square, fresh ones are zero."""
    target = {"hidden_size": 16 * heads[0], "num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    if new == "zero-output" and heads[1] > 3:  # fresh key heads move the mean square of the keys
        plan = plan_growth(small_architecture(family), recipe_of(target=target, width={"heads": {"new": new}}))
        assert "so that kv_heads keep the source's function only with new: copy" in plan.inexact[0]
        return
    assert difference(family, target, width={"heads": {"new": new}}) <= 1e-12
    if heads[1] == 3:  # drawn copies of key heads would be unequal
        assert difference(family, target, True, width={"heads": {"new": new}, "order": "drawn"}) <= 1e-12


@pytest.mark.default_run("pairs")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(
    "breaking", [{"method": "noise", "snr_db": 3.0}, {"method": "diagonal"}], ids=lambda b: b["method"]
)
def test_symmetry_breaking(fp64_norms, family: str, tied: bool, breaking):
    """Twice the hidden size and the heads: each of the copies differs from the other, and together they are the source."""
    width = {"ffn": {"new": "copy"}, "heads": {"new": "copy"}, "symmetry_breaking": breaking}
    target = {"hidden_size": 192, "intermediate_size": 500, "num_attention_heads": 12}
    if "kv_heads" in families()[family].axes:
        target["num_key_value_heads"] = 6
    assert difference(family, target, tied, width=width) <= 1e-12


def test_diagonal_copies_read_their_own():
    """Staged Training's matrices: the source twice on the diagonal, zeros beside it; the head reads both halves."""
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture))
    width = {"ffn": {"new": "copy"}, "symmetry_breaking": {"method": "diagonal"}}
    grown = grown_tensors(source, recipe_of(target={"hidden_size": 192, "intermediate_size": 500}, width=width))
    for name in ("mlp.up_proj", "mlp.down_proj"):
        old = source.read(f"model.layers.1.{name}.weight")
        assert torch.equal(whole(grown, f"model.layers.1.{name}.weight"), torch.block_diag(old, old))
    assert torch.equal(whole(grown, "lm_head.weight"), source.read("lm_head.weight").repeat(1, 2) / 2)


def test_noise_has_its_size_and_cancels():
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture))
    name = "model.layers.0.mlp.up_proj.weight"
    old = source.read(name)
    breaking = {"method": "noise", "snr_db": 20.0}
    grown = whole(
        grown_tensors(source, recipe_of(target={"hidden_size": 192}, width={"symmetry_breaking": breaking})), name
    )
    noise = grown - old.repeat(1, 2) / 2
    torch.testing.assert_close(noise[:, :96], -noise[:, 96:])
    relative = float(2 * noise.square().mean().sqrt() / old.square().mean().sqrt())
    assert abs(relative - 0.1) < 0.005, "20 dB below the weights that are split between two copies"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("family", "hidden"), [("llama", 222), ("qwen3", 222), ("gpt2", 208), ("olmo2", 288)])
def test_whole_copies_and_padding(fp64_norms, family: str, hidden, tied: bool):
    """LEMON's expansion: 222 = 2 x 96 + 30."""
    target = {"hidden_size": hidden}
    if family in HIDDEN_PER_HEAD:
        target["num_attention_heads"] = hidden // 16
    if family in EQUAL:
        target["num_key_value_heads"] = 9
    new = "copy" if family in EQUAL else "zero-output"
    assert difference(family, target, tied, width={"hidden": "lemon", "heads": {"new": new}}) <= 1e-12


@pytest.mark.parametrize(
    ("width", "reason"),
    [
        ({"hidden": "fpi"}, "fpi with positions copied unequally often"),
        ({"hidden": "random", "std": 0.1}, "random does not keep the source's function"),
        ({"hidden": "constant", "constant": 0.01}, "constant does not keep the source's function"),
    ],
)
def test_inexact_padding_is_as_published_and_says_so(fp64_norms, width, reason):
    architecture = small_architecture("llama")
    model = drawn_model(architecture)
    source = model_checkpoint(architecture, model)
    grown = grown_tensors(
        source, recipe_of(target={"hidden_size": 144}, width={**width, "symmetry_breaking": {"method": "none"}})
    )
    assert reason in grown.plan.inexact[0]
    assert relative_difference(model, grown_model(grown)) > 1e-2
    name, norm = "model.layers.1.mlp.down_proj.weight", "model.layers.1.input_layernorm.weight"
    old, new = source.read(name), whole(grown, name)
    assert torch.equal(new[:96], old) and torch.equal(whole(grown, norm)[:96], source.read(norm))
    if width["hidden"] == "fpi":
        index = list(grown.plan.axes["hidden"].index)
        assert torch.equal(new, old[index]) and index[:96] == list(range(96)) and len(set(index[96:])) > 20
        read = whole(grown, "model.layers.1.mlp.up_proj.weight")
        counts = torch.bincount(torch.tensor(index))[index]
        torch.testing.assert_close(read, source.read("model.layers.1.mlp.up_proj.weight")[:, index] / counts)
    elif width["hidden"] == "random":
        assert abs(float(new[96:].std()) - 0.1) < 0.005
    else:
        assert (new[96:] == 0.01).all() and (whole(grown, "model.layers.1.mlp.up_proj.weight")[:, 96:] == 0.01).all()
        assert (whole(grown, norm)[96:] == 1.0).all()


# Not constant in gpt_neox: units that write the same everywhere move the mean alone, which LayerNorm subtracts.
@pytest.mark.parametrize(
    ("family", "new"), [("llama", "random"), ("llama", "constant"), ("phi3", "constant"), ("gpt_neox", "random")]
)
def test_padded_units_are_as_asked_and_change_the_function(fp64_norms, family: str, new):
    """Initial value padding of FFN neurons and heads: old entries stay, all others are drawn or the constant."""
    architecture = small_architecture(family)
    model = drawn_model(architecture)
    source, axes = model_checkpoint(architecture, model), architecture.family.axes
    target = {axes["ffn"]: 331}
    if family == "llama":
        target |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    width = {"ffn": {"new": new}, "heads": {"new": new}, "std": 0.1, "constant": 0.03}
    grown = grown_tensors(source, recipe_of(target=target, width=width))
    reason = f"width.ffn.new: {new} and width.heads.new: {new}" if family == "llama" else f"width.ffn.new: {new}"
    assert grown.plan.inexact == (f"{reason} does not keep the source's function: new units write at once",)
    assert relative_difference(model, grown_model(grown)) > 1e-3
    padded = 0
    for spec in grown.plan.target.stored:
        old, found = source.read(spec.name), whole(grown, spec.name)
        index = [torch.from_numpy(grown.plan.index(spec, dimension)) for dimension in range(found.dim())]
        kept = torch.zeros_like(found, dtype=torch.bool)
        kept[torch.meshgrid(*[(part >= 0).nonzero()[:, 0] for part in index], indexing="ij")] = True
        assert torch.equal(found[kept], old.reshape(-1)), spec.name
        if new == "constant":
            assert (found[~kept] == 0.03).all(), spec.name
        elif found.dim() == 2 and not kept.all():
            assert abs(float(found[~kept].std()) - 0.1) < 0.01, spec.name
        padded += int(not kept.all())
    assert padded == {"llama": 21, "phi3": 6, "gpt_neox": 9}[family]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_copies_of_the_next_layer_are_as_published(fp64_norms, family: str):
    """bert2BERT's AKI: columns as FPI splits them; rows beyond the first copies are those of the layer above."""
    architecture = small_architecture(family)
    model = drawn_model(architecture)
    source = model_checkpoint(architecture, model, with_moments=True)
    fields = architecture.family.axes
    target = {fields["ffn"]: 331, fields["hidden"]: 144, fields["heads"]: 9}
    width = {"hidden": "fpi", "ffn": {"new": "copy"}, "heads": {"new": "copy"}, "copies_from": "next-layer"}
    grown = grown_tensors(
        source, recipe_of(target=target, width={**width, "symmetry_breaking": {"method": "none"}}, optimizer="copy")
    )
    assert any("copies_from: next-layer does not keep" in reason for reason in grown.plan.inexact)
    assert relative_difference(model, grown_model(grown)) > 1e-2
    ffn, hidden = (torch.tensor(grown.plan.axes[axis].index) for axis in ("ffn", "hidden"))
    name = {"llama": "model.layers.{}.mlp.up_proj.weight", "gpt2": "transformer.h.{}.mlp.c_fc.weight"}[family]
    turn = (lambda matrix: matrix) if family == "llama" else (lambda matrix: matrix.T)
    split = 1.0 / torch.bincount(hidden)[hidden]
    for layer, above in ((0, 1), (1, 2), (2, 2)):
        own, upper = (turn(source.read(name.format(number))) for number in (layer, above))
        expected = torch.cat([own, upper[ffn[250:]]])[:, hidden] * split
        torch.testing.assert_close(turn(whole(grown, name.format(layer))), expected)
    moment = turn(source.read(name.format(1), "exp_avg"))[ffn[250:]][:, hidden]
    torch.testing.assert_close(turn(whole(grown, name.format(0), "exp_avg"))[250:], moment)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_new_tokens_leave_the_old_ones_logits(fp64_norms, family: str, tied: bool):
    """New entries start as the mean of the old ones; they take probability, which the plan says."""
    architecture = small_architecture(family, tie_word_embeddings=tied)
    model = drawn_model(architecture)
    source = model_checkpoint(architecture, model)
    target = {"vocab_size": 118, architecture.family.axes["hidden"]: 192, architecture.family.axes["heads"]: 12}
    grown = grown_tensors(source, recipe_of(target=target, width={"heads": {"new": "zero-output"}}))
    assert "new entries take probability" in grown.plan.inexact[0] and len(grown.plan.inexact) == 1
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        old, new = model(tokens).logits, grown_model(grown)(tokens).logits
    assert new.shape[-1] == 118 and float((new[..., :101] - old).abs().max() / old.abs().max()) <= 1e-12
    table = next(spec.name for spec in architecture.stored if spec.role == "embedding")
    rows = whole(grown, table)
    torch.testing.assert_close(rows[101:], rows[:101].mean(dim=0).expand(17, -1))


@pytest.mark.default_run("pairs")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head_dim", [16, 24])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "granite", "smollm3"])
def test_larger_heads(fp64_norms, family: str, head_dim, tied: bool):
    """Pairs of the rotary positions move to where they turn as fast; together with everything else too."""
    assert difference(family, {"head_dim": head_dim}, tied, length=50) <= 1e-12
    assert difference(family, {**EVERYTHING, "head_dim": head_dim}, tied, width={"heads": {"new": "copy"}}) <= 1e-12


YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 1.0,
}
SCALED = {
    "another base": {"rope_type": "default", "rope_theta": 77.0},
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3", "factor": 4.0, "rope_theta": 500.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {**YARN, "truncate": False},
}  # fmt: skip


@pytest.mark.parametrize("kind", SCALED)
def test_larger_heads_under_scaled_rotary_positions(fp64_norms, kind):
    """The frequencies are fp32 numbers of transformers' own, so the bound is theirs."""
    architecture = small_architecture("llama", max_position_embeddings=256, rope_parameters=SCALED[kind])
    source = drawn_model(architecture)
    grown = grown_tensors(model_checkpoint(architecture, source), recipe_of(target={"head_dim": 24}))
    assert grown.plan.function_preserving
    assert relative_difference(source, grown_model(grown), length=100) <= 1e-6
    plain = small_architecture("llama", max_position_embeddings=256)
    moved = grown_tensors(model_checkpoint(plain, drawn_model(plain)), recipe_of(target={"head_dim": 24}))
    unscaled = grown_model(moved)
    assert relative_difference(source, unscaled, length=100) > 1e-3, "the scaling matters at this length"


@pytest.mark.parametrize(
    ("family", "changes", "head_dim", "message"),
    [
        ("llama", {}, 20, r"target\.head_dim: 20 is not a multiple of the source's 8.*nearest sizes that work: 16, 24"),
        ("llama", {}, 4, r"target\.head_dim: 4 is smaller than the source's 8"),
        (
            "qwen3",
            {},
            16,
            r"qwen3's queries and keys pass through more .* head_dim grows in gemma2, granite, llama, mistral, qwen2, smollm3\.",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            16,
            "under rope_type dynamic .*; head_dim grows under default, linear, llama3, yarn",
        ),
        (
            "llama",
            {"rope_parameters": {**YARN, "truncate": True}},
            16,
            r"pair 1 of a head turns .*, but the pair 2 that it moves",
        ),
    ],
)
def test_heads_that_cannot_grow(family: str, changes, head_dim, message: str):
    with pytest.raises(GrowthError, match=message):
        plan_growth(small_architecture(family, **changes), recipe_of(target={"head_dim": head_dim}))


def test_more_positions_keep_the_function(fp64_norms):
    assert difference("gpt2", {"n_positions": 128}, length=64) <= 1e-12
    assert difference("opt", {"max_position_embeddings": 80}, length=64) <= 1e-12
    assert difference("llama", {"max_position_embeddings": 128}, length=64) <= 1e-12


@pytest.mark.parametrize("kind", SCALED)
def test_a_longer_context_keeps_how_rotary_pairs_turn(fp64_norms, kind):
    """They do not depend on the longest position, whatever the scaling; those of dynamic NTK do."""
    architecture = small_architecture("llama", max_position_embeddings=128, rope_parameters=SCALED[kind])
    source = drawn_model(architecture)
    grown = grown_tensors(model_checkpoint(architecture, source), recipe_of(target={"max_position_embeddings": 256}))
    assert grown.plan.function_preserving and grown.plan.target.config["max_position_embeddings"] == 256
    assert relative_difference(source, grown_model(grown), length=120) <= 1e-12
    dynamic = small_architecture("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(GrowthError, match="max_position_embeddings: 128 differs from the source's 64, and no operator"):
        plan_growth(dynamic, recipe_of(target={"max_position_embeddings": 128}))


def test_another_scaling_of_rotary_positions_keeps_the_base_and_says_that_the_function_changes():
    architecture = small_architecture("llama", rope_parameters={"rope_type": "default", "rope_theta": 77.0})
    model = drawn_model(architecture)
    asked = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    recipe = recipe_of(target={"max_position_embeddings": 256, "rope_parameters": asked})
    grown = grown_tensors(model_checkpoint(architecture, model), recipe)
    assert recipe.target["rope_parameters"] == asked, "the recipe stays as it was"
    assert grown.plan.target.config["rope_parameters"] == {**asked, "rope_theta": 77.0}
    assert "target.rope_parameters: the rotary pairs turn at other speeds" in grown.plan.inexact[0]
    assert relative_difference(model, grown_model(grown), length=60) > 1e-3
    same = recipe_of(target={"rope_parameters": {"rope_type": "default"}})
    assert plan_growth(architecture, same).function_preserving


@pytest.mark.default_run("pairs")
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
    assert plan.target.num_layers == 4 and not plan.function_preserving
    assert set(plan.dropped) == {spec.name for spec in architecture.stored if spec.layer == 1}
    assert "depth.map leaves layers out or changes their order" in plan.notes[0]
    assert not plan_growth(
        architecture, recipe_of(target={}, depth={"method": "map", "map": [1, 0, 2]})
    ).function_preserving


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
@pytest.mark.parametrize("family", unlike(OTHERS))
def test_depth_of_every_other_family(fp64_norms, family: str, new):
    assert difference(family, {"num_hidden_layers": 5}, depth={"new": new}) <= 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_growing_by_nothing_is_the_identity(fp64_norms, family: str):
    architecture = small_architecture(family)
    source = model_checkpoint(architecture, drawn_model(architecture), with_moments=True)
    grown = grown_tensors(source, recipe_of(target={}))
    for spec in architecture.stored:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            bounds = tuple((0, size) for size in spec.shape)
            assert torch.equal(grown.read(spec.name, state, bounds), source.read(spec.name, state))


AGAIN = {"hidden_size": 233, "num_hidden_layers": 6, "intermediate_size": 400, "num_attention_heads": 12}


def everything_again(family):
    """A second target, larger than ``everything`` on every axis that the family lets grow."""
    if family in EQUAL:
        again = {**AGAIN, "hidden_size": 384, "num_attention_heads": 24, "num_key_value_heads": 12}
    elif family in HIDDEN_PER_HEAD:
        again = {**AGAIN, "hidden_size": 240, "num_attention_heads": 15, "num_key_value_heads": 15}
    else:
        again = {**AGAIN, "hidden_size": 228}
    return {field: size for field, size in again.items() if AXES[field] in families()[family].axes}


@pytest.mark.parametrize("family", unlike(FAMILIES))
def test_two_growths_in_a_row_keep_the_function(fp64_norms, family: str):
    architecture = small_architecture(family, tie_word_embeddings=True)
    model = drawn_model(architecture)
    width = {"heads": {"new": "copy" if family in EQUAL else "zero-output"}}
    middle, checkpoint = model, model_checkpoint(architecture, model)
    for target in (everything(family), everything_again(family)):
        grown = grown_tensors(
            checkpoint, recipe_of(target=renamed(family, target), width=width, function_preserving="required")
        )
        middle = grown_model(grown)
        checkpoint = model_checkpoint(grown.plan.target, middle)
    assert checkpoint.architecture.num_parameters > 2 * architecture.num_parameters
    assert relative_difference(model, middle) <= 1e-12


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
    assert not grown.plan.function_preserving
    assert "does not keep the source's function" in grown.plan.notes[0]
    assert relative_difference(source, grown_model(grown)) > 1e-3


RANDOM_SHAPES = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@RANDOM_SHAPES
@given(
    hidden=st.integers(96, 230),
    ffn=st.integers(250, 600),
    heads=st.integers(6, 18),
    kv_heads=st.integers(3, 18),
    times=st.integers(1, 3),
    layers=st.integers(3, 7),
    method=st.sampled_from(["auto", "isometric", "zero", "zero-scaled-eps", "lemon"]),
    new=st.sampled_from(["zero-output", "copy"]),
    order=st.sampled_from(["tile", "interleave", "drawn"]),
    depth=st.sampled_from(sorted(METHODS)),
    family=st.sampled_from(LLAMA_LIKE),
    tied=st.booleans(),
)
def test_any_shape_is_exact_or_refused(
    fp64_norms, hidden, ffn, heads, kv_heads, times, layers, method, new, order, depth, family, tied
):
    target = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
    }
    if family != "qwen3":  # its heads have norms of their own
        target["head_dim"] = times * 8
    width = {"hidden": method, "ffn": {"new": new}, "heads": {"new": new}, "order": order}
    try:
        found = difference(family, target, tied, width=width, depth={"method": depth})
    except IncrError as refusal:
        assert any(
            reason in str(refusal)
            for reason in ("work", "can be", "Nearest", "use width.hidden: zero", "set num_attention_heads:")
        )
        return
    assert found <= 1e-12


@pytest.mark.parametrize("family", unlike(OTHERS))
@settings(RANDOM_SHAPES, max_examples=6)
@given(
    units=st.integers(0, 12),
    ffn=st.integers(250, 600),
    layers=st.integers(3, 7),
    method=st.sampled_from(["auto", "integer", "lemon", "zero", "mean", "centred"]),
    breaking=st.sampled_from(["per-element", "noise", "diagonal", "none"]),
    new=st.sampled_from(["zero-output", "copy"]),
    silent=st.sampled_from(["zero-output", "identity"]),
    depth=st.sampled_from(sorted(METHODS)),
    tied=st.booleans(),
)
def test_any_shape_of_every_other_family_is_exact_or_refused(
    fp64_norms, family: str, units, ffn, layers, method, breaking, new, silent, depth, tied: bool
):
    """Shapes that the family's own rules allow: whole heads where hidden is heads times their size, OLMo-2's equal copies."""
    target = {"hidden_size": 96 + 16 * units, "intermediate_size": ffn, "num_hidden_layers": layers}
    if family in EQUAL:
        target |= {"hidden_size": 96 * (1 + units % 3), "num_key_value_heads": 3 * (1 + units % 3)}
    if family in HIDDEN_PER_HEAD:
        target["num_attention_heads"] = target["hidden_size"] // 16
    elif units % 2:
        target |= {"num_attention_heads": 8, "num_key_value_heads": 4}
    if family == "phi3":
        target["num_key_value_heads"] = target["num_attention_heads"] if units else 3
    width = {"hidden": method, "ffn": {"new": new}, "heads": {"new": "copy" if family in EQUAL else new}}
    width["symmetry_breaking"] = {"method": breaking}
    try:
        source = small_architecture(family, tie_word_embeddings=tied)
        plan_growth(source, recipe_of(target=renamed(family, target), width=width, function_preserving="required"))
        found = difference(family, target, tied, width=width, depth={"method": depth, "new": silent})
    except IncrError as refusal:
        reasons = (
            "work",
            "can be",
            "Nearest",
            ", set num_",
            "pads for LayerNorm",
            "whose mean changes",
            "width.hidden: mean does",
        )
        assert any(reason in str(refusal) for reason in reasons)
        return
    assert found <= 1e-12
