"""The ratio of gradient norms is that of the gradients themselves."""

import pytest
import torch
from grown import grown_model, grown_tensors, recipe_of

from incr_ds.growth.gradients import gradient_norm_ratio
from incr_ds.testing.checkpoint import MemoryCheckpoint
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture

EVEN = {"ffn": {"new": "copy"}, "heads": {"new": "copy"}, "symmetry_breaking": {"method": "none"}}
DOUBLE = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 500}
CASES = {
    "integer": ("llama", {"target": DOUBLE, "width": EVEN}),
    "isometric": ("llama", {"target": {"hidden_size": 144}, "width": {**EVEN, "hidden": "isometric"}}),
    "gemma2": ("gemma2", {"target": {"hidden_size": 192}, "width": EVEN}),
    "olmo2": (
        "olmo2",
        {"target": {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 6}, "width": EVEN},
    ),
    "gpt2": ("gpt2", {"target": {"n_embd": 192, "n_head": 12, "n_inner": 500}, "width": EVEN}),
}


def gradients(model):
    tokens = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(3))
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def after_one_step(architecture, model):
    """A source whose exp_avg_sq are the squares of one batch's gradients."""
    found = gradients(model)
    states = {"weight": {name: p.data for name, p in model.named_parameters()}, "exp_avg": found}
    return MemoryCheckpoint(
        architecture, {**states, "exp_avg_sq": {key: g.square() for key, g in found.items()}}, step=1
    )


def norm(found):
    return torch.stack([gradient.square().sum() for gradient in found.values()]).sum().sqrt().item()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_the_ratio_is_that_of_the_gradients(fp64_norms, name, tied: bool):
    family, content = CASES[name]
    architecture = small_architecture(family, tie_word_embeddings=tied)
    model = drawn_model(architecture)
    source = after_one_step(architecture, model)
    grown = grown_tensors(source, recipe_of(**content))
    expected = norm(gradients(grown_model(grown))) / norm(gradients(drawn_model(architecture)))
    assert abs(expected - 1.0) > 1e-4
    assert gradient_norm_ratio(grown.plan, source) == pytest.approx(expected, rel=1e-9)


def test_new_layers_count_by_what_writes():
    architecture = small_architecture("llama")
    source = after_one_step(architecture, drawn_model(architecture))
    plan = grown_tensors(source, recipe_of(target={"num_hidden_layers": 4}, depth={"method": "append"})).plan
    writers = [f"model.layers.2.{name}.weight" for name in ("self_attn.o_proj", "mlp.down_proj")]
    squares = {spec.name: source.read(spec.name, "exp_avg_sq").sum() for spec in architecture.stored}
    whole = sum(squares.values())
    expected = ((whole + sum(squares[name] for name in writers)) / whole).sqrt().item()
    assert gradient_norm_ratio(plan, source) == pytest.approx(expected, rel=1e-12)


def test_unknown_without_moments_or_exactness():
    architecture = small_architecture("llama")
    model = drawn_model(architecture)
    grows = {"target": {"intermediate_size": 260}}
    bare = model_checkpoint(architecture, model)
    assert gradient_norm_ratio(grown_tensors(bare, recipe_of(**grows, optimizer="reset")).plan, bare) is None
    source = model_checkpoint(architecture, model, with_moments=True)
    assert gradient_norm_ratio(grown_tensors(source, recipe_of(**grows)).plan, source) is not None
    inexact = recipe_of(target={"num_hidden_layers": 6}, depth={"method": "stack", "new": "copy"})
    assert gradient_norm_ratio(grown_tensors(source, inexact).plan, source) is None
