"""Published methods as named recipes: each grows a model, and is exact or not as its entry says."""

import pytest
from grown import grown_model, grown_tensors, recipe_of, relative_difference

from incr_ds.config.growth import GrowthRecipe, methods
from incr_ds.errors import ConfigError
from incr_ds.growth.planner import plan_growth
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture

EXACT = {"hypercloning", "lemon", "llama-pro", "staged"}
DEPTH = {"num_hidden_layers": 4}
WIDTH = {"hidden_size": 192, "intermediate_size": 500, "num_attention_heads": 12, "num_key_value_heads": 6}
TARGETS = {
    "incr-pretrain": {**WIDTH, **DEPTH, "hidden_size": 144},
    "hypercloning": WIDTH,
    "bert2bert": {**WIDTH, **DEPTH, "hidden_size": 144},
    "bert2bert-aki": {**WIDTH, **DEPTH, "hidden_size": 144},
    "lemon": {**WIDTH, **DEPTH, "hidden_size": 228},
    "staged": {**WIDTH, **DEPTH},
}


@pytest.mark.parametrize("name", sorted(methods()))
def test_method(fp64_norms, name):
    architecture = small_architecture("llama", tie_word_embeddings=True)
    model = drawn_model(architecture)
    recipe = recipe_of(recipe=name, target=TARGETS.get(name, DEPTH))
    grown = grown_tensors(model_checkpoint(architecture, model, with_moments=True), recipe)
    found = relative_difference(model, grown_model(grown))
    assert grown.plan.function_preserving == (name in EXACT)
    assert found <= 1e-12 if name in EXACT else found > 1e-3
    assert grown.plan.notes[0] == f"{name}: {methods()[name].published}. {methods()[name].known}"
    assert (
        "keep the function" in methods()[name].known or "Function-preserving in neither" in methods()[name].known
    ) == (name not in EXACT)


@pytest.mark.parametrize(
    ("name", "target", "note"),
    [
        (
            "g_stack",
            {"hidden_size": 192},
            "g_stack is published for depth alone; the growth in width is this recipe's own",
        ),
        ("hypercloning", DEPTH, "hypercloning is published for width alone; the growth in depth is this recipe's own"),
        ("lemon", {**DEPTH, "hidden_size": 192}, None),
        ("llama-pro", DEPTH, None),
    ],
)
def test_what_a_method_is_not_published_for_is_said(name, target, note):
    notes = plan_growth(small_architecture("llama"), recipe_of(recipe=name, target=target)).notes
    assert [text for text in notes if "is published for" in text] == [note] * (note is not None)


def test_what_the_file_states_wins():
    recipe = recipe_of(
        recipe="hypercloning", target={}, width={"symmetry_breaking": {"snr_db": 20.0}}, optimizer="rescale"
    )
    assert recipe.width.hidden == "integer" and recipe.optimizer == "rescale"
    assert (recipe.width.symmetry_breaking.method, recipe.width.symmetry_breaking.snr_db) == ("noise", 20.0)


def test_unknown_method():
    with pytest.raises(
        ConfigError, match=r"'stacking' is not a known method; known: incr-pretrain, hypercloning, g_stack, bert2bert"
    ):
        recipe_of(recipe="stacking", target={})


def test_every_method_is_a_valid_recipe():
    for method in methods().values():
        assert GrowthRecipe.model_validate({"target": {}, **method.recipe}).target == {}
