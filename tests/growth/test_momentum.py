"""Muon's momentum after growth: the trajectory of Muon and AdamW continues the source's, and every mode does what it says."""

import pytest
import torch
from grown import grown_model, grown_tensors, recipe_of, whole
from test_moments import EVEN_COPIES, adamw, batches, doubled

from incr_ds.arch.multipliers import UNCHANGED
from incr_ds.growth.gradients import gradient_norm_ratio
from incr_ds.growth.multipliers import grown_multipliers
from incr_ds.sharding.optimizer_groups import set_apart
from incr_ds.testing.checkpoint import MemoryCheckpoint
from incr_ds.testing.memory import drawn_model, small_architecture

RATE, BETA, DECAY = 3e-3, 0.9, 0.1


class MuonBesideAdamW:
    """The published iteration (kellerjordan.github.io/posts/muon) for matrices of layers, and AdamW for the rest.

    Without the 1e-7 beside the norm, which depends on the gradient's size.
    """

    def __init__(self, model, apart, multipliers):
        named = dict(model.named_parameters())
        self.matrices = {name: named[name] for name in apart}
        self.momenta = {name: torch.zeros_like(value) for name, value in self.matrices.items()}
        self.multipliers = multipliers
        self.rest = adamw(model, multipliers)
        self.rest.param_groups = [
            group
            for group in self.rest.param_groups
            if not any(group["params"][0] is m for m in self.matrices.values())
        ]

    def zero_grad(self):
        for group in (*self.rest.param_groups, {"params": list(self.matrices.values())}):
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self):
        self.rest.step()
        for name, parameter in self.matrices.items():
            own, momentum = self.multipliers(name), self.momenta[name]
            momentum.lerp_(parameter.grad, 1 - BETA)
            update = orthogonal(parameter.grad.lerp(momentum, BETA))
            parameter.mul_(1 - RATE * own.lr * DECAY * own.weight_decay).add_(update, alpha=-RATE * own.lr)


def orthogonal(update):
    tall = update.shape[0] > update.shape[1]
    x = update.T if tall else update
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if tall else x) * max(1.0, update.shape[0] / update.shape[1]) ** 0.5


def train(model, optimizer, data):
    losses = []
    for tokens in data:
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 101), tokens[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(architecture):
    """A source after five steps, its optimizer, and its logical checkpoint."""
    source = drawn_model(architecture)
    optimizer = MuonBesideAdamW(source, set_apart("muon", architecture), lambda _: UNCHANGED)
    train(source, optimizer, batches(5, seed=1))
    states = {"weight": {name: parameter.data.clone() for name, parameter in source.named_parameters()}}
    adams = {name: optimizer.rest.state[p] for name, p in source.named_parameters() if p in optimizer.rest.state}
    for key in ("exp_avg", "exp_avg_sq"):
        states[key] = {name: state[key].clone() for name, state in adams.items()}
    states["momentum_buffer"] = {name: momentum.clone() for name, momentum in optimizer.momenta.items()}
    return source, optimizer, MemoryCheckpoint(architecture, states, step=5)


def grown_optimizer(grown, model, momentum):
    multipliers = grown_multipliers(grown.plan, {}, momentum)
    optimizer = MuonBesideAdamW(
        model, grown.plan.momentum(grown._source.facts), lambda n: multipliers.get(n, UNCHANGED)
    )
    for name, parameter in model.named_parameters():
        if name in optimizer.momenta:
            optimizer.momenta[name].copy_(whole(grown, name, "momentum_buffer"))
        else:
            moments = {key: whole(grown, name, key) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.rest.state[parameter] = {"step": torch.tensor(5.0), **moments}
    return optimizer


# Which sizes grow decides how a matrix changes its shape: in both dimensions, in one, wide ones to tall ones.
TARGETS = {"everything": ("hidden", "ffn", "heads", "kv_heads"), "hidden": ("hidden",), "ffn": ("ffn",)}
CASES = [("llama", True, "hidden"), ("gpt_neox", False, "ffn")]
OTHERS = [
    ("llama", False, "everything"),
    ("qwen3", True, "ffn"),
    ("gpt2", True, "everything"),
    ("phi3", False, "everything"),
]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS]


@pytest.mark.parametrize(("family", "tied", "sizes"), CASES)
def test_forty_steps_of_muon_are_the_sources(fp64_norms, family, tied, sizes):
    """With the rates that the plan gives, integer copies train as one under Muon, too."""
    architecture = small_architecture(family, tie_word_embeddings=tied)
    source, optimizer, checkpoint = trained(architecture)
    fields = {architecture.family.axes[axis] for axis in TARGETS[sizes] if axis in architecture.family.axes}
    target = {field: size for field, size in doubled(architecture).items() if field in fields}
    grown = grown_tensors(checkpoint, recipe_of(target=target, width=EVEN_COPIES))
    model = grown_model(grown)
    larger = grown_optimizer(grown, model, checkpoint.facts.momentum)
    data = batches(4, seed=2) * 10
    expected, found = train(source, optimizer, data), train(model, larger, data)
    assert expected[-1] < expected[0] - 0.1
    assert max(abs(a - b) for a, b in zip(expected, found, strict=True)) <= 1e-11


def test_the_rate_of_a_matrix_follows_its_shape():
    """Copies of an output make Muon's step smaller by the root of their number; Muon's own factor of the shape counts, too."""
    architecture = small_architecture("llama", num_hidden_layers=1)
    _, _, checkpoint = trained(architecture)

    def rates(**target):
        plan = grown_tensors(checkpoint, recipe_of(target=target, width=EVEN_COPIES)).plan
        found = grown_multipliers(plan, {}, checkpoint.facts.momentum)
        return {name.removeprefix("model.layers.0."): own for name, own in found.items() if ".layers." in name}

    ffn = rates(intermediate_size=500)  # up: [250, 96] -> [500, 96], down: [96, 250] -> [96, 500]
    # Up: twice the rows, and a shape factor of sqrt(500 / 96) instead of sqrt(250 / 96). Down: half in each of two columns.
    assert "mlp.up_proj.weight" not in ffn and "mlp.gate_proj.weight" not in ffn
    assert ffn["mlp.down_proj.weight"].lr == pytest.approx(2**-0.5)
    assert ffn["mlp.down_proj.weight"].weight_decay == pytest.approx(2**0.5)
    hidden = rates(hidden_size=192)  # down: [96, 250] -> [192, 250], o_proj: [96, 96] -> [192, 96]
    assert hidden["mlp.down_proj.weight"].lr == pytest.approx(2**0.5)
    assert "self_attn.o_proj.weight" not in hidden  # sqrt(2) by its rows, and sqrt(2) by its shape
    assert hidden["input_layernorm.weight"].eps == 0.5  # AdamW's rule


@pytest.mark.parametrize("optimizer", ["rescale", "copy", "reset-new", "reset"])
def test_optimizer_modes(optimizer):
    architecture = small_architecture("llama")
    _, _, source = trained(architecture)
    target = {"hidden_size": 192, "intermediate_size": 331, "num_hidden_layers": 4}
    grown = grown_tensors(source, recipe_of(target=target, width={"ffn": {"new": "random"}}, optimizer=optimizer))
    assert [layer.is_new for layer in grown.plan.layers].count(True) == 1
    new = next(number for number, layer in enumerate(grown.plan.layers) if layer.is_new)
    name = "model.layers.0.mlp.down_proj.weight"  # [192, 331]: rows twice, 81 fresh columns
    found, old = whole(grown, name, "momentum_buffer"), source.read(name, "momentum_buffer")
    expected = torch.zeros(192, 331, dtype=found.dtype)
    if optimizer != "reset":
        factor = 1.0 if optimizer == "copy" else 0.5  # each copy of an output gets half of the gradient
        expected[:96, :250] = factor * old
        expected[96:, :250] = 0.0 if optimizer == "reset-new" else factor * old
    assert torch.allclose(found, expected, rtol=1e-12) and (found.any() == (optimizer != "reset"))
    assert not whole(grown, f"model.layers.{new}.mlp.down_proj.weight", "momentum_buffer").any()
    kept = grown_multipliers(grown.plan, {}, source.facts.momentum)
    assert any(own.lr != 1.0 for own in kept.values()) == (optimizer == "rescale")
    apart = set_apart("muon", grown.plan.target)
    assert grown.plan.momentum(source.facts) == (apart if optimizer != "reset" else frozenset())


def test_the_norm_of_all_gradients_is_not_known():
    """Muon keeps no second moments of its matrices."""
    architecture = small_architecture("llama")
    _, _, source = trained(architecture)
    plan = grown_tensors(source, recipe_of(target={"hidden_size": 192}, width=EVEN_COPIES)).plan
    assert plan.function_preserving and gradient_norm_ratio(plan, source) is None
