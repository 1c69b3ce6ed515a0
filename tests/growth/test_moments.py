"""Adam's moments after growth: AdamW's trajectory continues the source's, and fresh entries cannot jump."""

import pytest
import torch
from grown import grown_model, grown_tensors, recipe_of, whole
from torch.nn.functional import cross_entropy

from incr_ds.arch.family import families, mixtures
from incr_ds.growth.axis import FRESH
from incr_ds.growth.plan import Multipliers
from incr_ds.offline.compare import logical_parts
from incr_ds.testing.checkpoint import MemoryCheckpoint
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture

LR, BETAS, EPS, DECAY = 3e-3, (0.9, 0.95), 1e-6, 0.1


def batches(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(101, (2, 12), generator=generator) for _ in range(count)]


def train(model, optimizer, data):
    losses = []
    for tokens in data:
        logits = model(tokens).logits
        loss = cross_entropy(logits[:, :-1].reshape(-1, 101), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(model, multipliers):
    groups = []
    for name, parameter in model.named_parameters():
        d = multipliers(name)
        groups.append(
            {"params": [parameter], "lr": LR * d.lr, "eps": EPS * d.eps, "weight_decay": DECAY * d.weight_decay}
        )
    return torch.optim.AdamW(groups, betas=BETAS)


def checkpoint_of(architecture, model, optimizer):
    states = {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}
    tensors = {"weight": {name: parameter.data.clone() for name, parameter in model.named_parameters()}}
    for key in ("exp_avg", "exp_avg_sq"):
        tensors[key] = {name: state[key].clone() for name, state in states.items()}
    return MemoryCheckpoint(architecture, tensors, step=int(next(iter(states.values()))["step"]))


def doubled(architecture):
    """Every width twice as large, as config fields."""
    axes = architecture.family.axes
    return {axes[axis]: 2 * architecture.sizes[axis] for axis in ("hidden", "ffn", "heads", "kv_heads") if axis in axes}


EVEN_COPIES = {"ffn": {"new": "copy"}, "heads": {"new": "copy"}, "symmetry_breaking": {"method": "none"}}


# Both for llama; for other families the harder case: tied heads where the norm has a bias, or where no norm precedes.
TRAINED = [("llama", False), ("llama", True), ("qwen3", True), ("gpt2", True), ("gpt_neox", False), ("opt", True)]


@pytest.mark.parametrize(("family", "tied"), [*TRAINED, ("olmo2", False), ("phi3", False)])
def test_forty_adamw_steps_are_the_sources(fp64_norms, family: str, tied: bool):
    """With lr, eps and decay multiplied as the plan says, integer copies train as one."""
    architecture = small_architecture(family, tie_word_embeddings=tied)
    source = drawn_model(architecture)
    optimizer = adamw(source, lambda _: Multipliers(1.0, 1.0, 1.0))
    train(source, optimizer, batches(5, seed=1))
    recipe = recipe_of(target=doubled(architecture), width=EVEN_COPIES)
    checkpoint = checkpoint_of(architecture, source, optimizer)
    grown = grown_tensors(checkpoint, recipe)
    model = grown_model(grown)
    grown_optimizer = adamw(model, grown.plan.multipliers)
    for name, parameter in model.named_parameters():
        grown_optimizer.state[parameter] = {
            "step": torch.tensor(float(checkpoint.facts.step)),
            "exp_avg": whole(grown, name, "exp_avg"),
            "exp_avg_sq": whole(grown, name, "exp_avg_sq"),
        }
    data = batches(4, seed=2) * 10  # repeated, so that there is something to learn
    expected, found = train(source, optimizer, data), train(model, grown_optimizer, data)
    assert expected[-1] < expected[0] - 0.1
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= 1e-12


@pytest.mark.default_run("values")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(families()))
def test_gradients_of_copies_follow_the_rule(fp64_norms, family: str, tied: bool):
    """The factors that scale exp_avg and momentum_buffer are those of the gradient itself, also where copies are uneven."""
    architecture = small_architecture(family, tie_word_embeddings=tied)
    source = drawn_model(architecture)
    target = doubled(architecture)
    if "head_dim" in architecture.family.axes:
        target |= {"hidden_size": 132, architecture.family.axes["ffn"]: 331}
    if "query_dim" in architecture.sizes:
        target |= {"head_dim": 16}
    check_gradients(architecture, source, target)


@pytest.mark.parametrize("family", sorted(mixtures()))
def test_gradients_of_copied_experts_follow_the_rule(fp64_norms, family: str):
    """Each of three copies of an expert, and its row of the router, gets a third of the gradient. transformers computes the
    shares of experts in fp32."""
    architecture = small_architecture(family)
    axes = architecture.family.axes
    target = {axes["experts"]: 12, "num_experts_per_tok": 6, "hidden_size": 144, axes["ffn"]: 331}
    check_gradients(architecture, drawn_model(architecture), target, relative=1e-5, absolute=1e-6)


@pytest.mark.parametrize("heads", [9, 12, 15])
def test_gradients_of_query_heads_under_one_norm_follow_the_rule(fp64_norms, heads):
    """OLMo-2: some heads once, some twice, some three times."""
    architecture = small_architecture("olmo2")
    check_gradients(architecture, drawn_model(architecture), {"hidden_size": 16 * heads, "num_attention_heads": heads})


def check_gradients(architecture, source, target, relative=1e-9, absolute=1e-13):
    recipe = recipe_of(target=target, width=EVEN_COPIES)
    # Give the growth the source's gradient in place of what averages it: it must come out as the grown model's gradient.
    tokens = batches(1, seed=5)[0]
    for_loss = source(tokens).logits
    cross_entropy(for_loss[:, :-1].reshape(-1, 101), tokens[:, 1:].reshape(-1)).backward()
    weights = {name: parameter.data for name, parameter in source.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in source.named_parameters()}
    states = {"weight": logical_parts(architecture, weights)}
    states |= dict.fromkeys(("exp_avg", "momentum_buffer"), logical_parts(architecture, gradients))
    checkpoint = MemoryCheckpoint(architecture, states, step=1)
    grown = grown_tensors(checkpoint, recipe)
    model = grown_model(grown)
    logits = model(tokens).logits
    cross_entropy(logits[:, :-1].reshape(-1, 101), tokens[:, 1:].reshape(-1)).backward()
    gradients = logical_parts(grown.plan.target, {name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients.items():
        expected = whole(grown, name, "exp_avg")
        assert torch.equal(whole(grown, name, "momentum_buffer"), expected)
        spec = grown.plan.target.by_name[name]
        # New positions of larger heads copy nothing, and have no moment to compare with.
        known = [torch.from_numpy(grown.plan.index(spec, d) != FRESH) for d in range(len(spec.dims))]
        copied = known[0] if len(known) == 1 else known[0][:, None] & known[1][None, :]
        found, tolerance = gradient[copied], absolute * float(expected.abs().max()) + 1e-16
        assert torch.allclose(found, expected[copied], rtol=relative, atol=tolerance), name


def test_second_moment_is_the_square_of_the_first_ones_scale(fp64_norms):
    architecture = small_architecture("qwen2")
    model = drawn_model(architecture)
    gradient = {name: torch.full_like(parameter, 3.0).data for name, parameter in model.named_parameters()}
    squared = {name: tensor**2 for name, tensor in gradient.items()}
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    checkpoint = MemoryCheckpoint(architecture, {"weight": weights, "exp_avg": gradient, "exp_avg_sq": squared}, step=9)
    recipe = recipe_of(target={"hidden_size": 144, "intermediate_size": 500}, width={"ffn": {"new": "copy"}})
    grown = grown_tensors(checkpoint, recipe)
    for spec in grown.plan.target.stored:
        assert torch.allclose(
            whole(grown, spec.name, "exp_avg") ** 2, whole(grown, spec.name, "exp_avg_sq"), rtol=1e-12
        )


def test_fresh_entries_cannot_jump():
    """At step 100 a zero second moment would make the first update several learning rates; it is filled instead."""
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture), with_moments=True)
    recipe = recipe_of(target={"intermediate_size": 331, "num_hidden_layers": 5})
    grown = grown_tensors(source, recipe)
    new_layers = [position for position, layer in enumerate(grown.plan.layers) if layer.is_new]
    assert new_layers == [1, 3]
    for spec in grown.plan.target.stored:
        assert (whole(grown, spec.name, "exp_avg_sq") > 0).all(), spec.name
        if spec.layer in new_layers:
            assert not whole(grown, spec.name, "exp_avg").any()
    gate = "model.layers.0.mlp.gate_proj.weight"
    first, second = whole(grown, gate, "exp_avg"), whole(grown, gate, "exp_avg_sq")
    assert not first[250:].any()
    assert torch.allclose(second[250:], source.read(gate, "exp_avg_sq").mean().expand_as(second[250:]))
    # One AdamW step with a gradient of typical size moves a fresh entry by no more than about one learning rate.
    typical = source.read(gate, "exp_avg_sq").mean().sqrt()
    beta1, beta2, step = 0.9, 0.95, 101
    moved = (1 - beta1) * typical / (1 - beta1**step)
    denominator = ((beta2 * second[250:] + (1 - beta2) * typical**2) / (1 - beta2**step)).sqrt()
    assert float((moved / denominator).max()) <= 1.0


@pytest.mark.parametrize(("optimizer", "factor"), [("copy", 1.0), ("rescale", 0.5)])
def test_optimizer_modes(optimizer, factor):
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture), with_moments=True)
    grown = grown_tensors(source, recipe_of(target={"hidden_size": 192}, optimizer=optimizer))
    name = "model.embed_tokens.weight"
    expected = factor * source.read(name, "exp_avg").repeat(1, 2)
    assert torch.allclose(whole(grown, name, "exp_avg"), expected)
    reset = grown_tensors(source, recipe_of(target={"hidden_size": 192}, optimizer="reset"))
    assert not whole(reset, name, "exp_avg").any() and not whole(reset, name, "exp_avg_sq").any()


def test_moments_of_new_entries_only_can_start_anew():
    """reset-new: the first copy of everything keeps its moments, the others start at zero with a typical second moment."""
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture), with_moments=True)
    target = {"hidden_size": 144, "intermediate_size": 331, "num_hidden_layers": 4}
    recipes = {name: recipe_of(target=target, optimizer=name) for name in ("rescale", "reset-new")}
    rescaled, anew = (grown_tensors(source, recipes[name]) for name in ("rescale", "reset-new"))
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight", "model.norm.weight"):
        old = tuple(slice(0, size) for size in architecture.by_name[name].shape)
        for state in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(whole(anew, name, state)[old], whole(rescaled, name, state)[old])
        rest = torch.ones(whole(anew, name).shape, dtype=torch.bool)
        rest[old] = False
        assert not whole(anew, name, "exp_avg")[rest].any()
        assert rest.sum() and (whole(anew, name, "exp_avg_sq")[rest] > 0).all()


@pytest.mark.parametrize("hidden", ["isometric", "zero"])
def test_the_nearest_rule_is_the_mean_of_what_positions_need(hidden):
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture), with_moments=True)
    plan = grown_tensors(source, recipe_of(target={"hidden_size": 144}, width={"hidden": hidden})).plan
    name = "model.layers.0.mlp.up_proj.weight"
    exact, nearest = plan.multipliers(name), plan.nearest_multipliers(name)
    if hidden == "isometric":
        # 48 of 96 dimensions are there twice: shares 1/2 at 96 of 144 columns, 1 at the other 48.
        assert exact is None and nearest.lr == pytest.approx((96 * 0.5 + 48) / 144)
    assert nearest.weight_decay == pytest.approx(1 / nearest.lr)
    embedding = plan.nearest_multipliers("model.embed_tokens.weight")
    if hidden == "zero":
        # Old positions carry sqrt(144 / 96); new ones need nothing, and do not count.
        assert embedding.lr == pytest.approx(1.5**0.5) and embedding.eps == pytest.approx(1.5**-0.5)


def test_groups_that_cannot_follow_exactly_are_noted():
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture), with_moments=True)
    for hidden, noted in (("isometric", True), ("integer", False)):
        recipe = recipe_of(target={"hidden_size": 240 if noted else 192}, width={**EVEN_COPIES, "hidden": hidden})
        notes = "; ".join(grown_tensors(source, recipe).plan.notes)
        assert ("the optimizer's multipliers are means" in notes) == noted
