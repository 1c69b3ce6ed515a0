"""Dense models become mixtures of experts that transformers loads: the same function, or the published definition."""

from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from grown import grown_model, grown_tensors, random_part, recipe_of, relative_difference, whole
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from incr_ds.arch.family import mixtures
from incr_ds.arch.flops import training_flops_per_token
from incr_ds.checkpoint.huggingface.writer import config_text
from incr_ds.errors import GrowthError
from incr_ds.growth.planner import plan_growth
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture

PAIRS = [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen3", "qwen3_moe")]
FFN = {"mixtral": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}
GROWTH = {"hidden_size": 144, "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}


def upcycling(mixture, experts=5, chosen=2, new="copy", ffn=None, growth=None, **recipe):
    target = {"model_type": mixture, "num_local_experts": experts, "num_experts_per_tok": chosen, **(growth or {})}
    if ffn is not None:
        target[FFN[mixture]] = ffn
    return recipe_of(target=target, experts={"new": new}, optimizer="reset", layout={"format": "huggingface"}, **recipe)


def published(grown, folder):
    """The grown tensors as a folder, loaded by transformers."""
    target = grown.plan.target
    save_file(
        {spec.saved_name: whole(grown, spec.name).clone().contiguous() for spec in target.stored},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(config_text(target, torch.float64))
    # The grouped products of the other implementations are not for fp64.
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager").eval()


@pytest.fixture
def fp64_norms(fp64_norms, monkeypatch: pytest.MonkeyPatch):
    """Mixtures too; and shares of the chosen experts that are not rounded to fp32."""
    from transformers.models.mixtral import modeling_mixtral
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    def norm(self, hidden):
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def route(self, hidden):
        logits = torch.nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        values, indices = torch.topk(logits.softmax(-1), self.top_k, dim=-1)
        return logits, values / values.sum(-1, keepdim=True), indices

    monkeypatch.setattr(modeling_mixtral.MixtralRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_mixtral.MixtralTopKRouter, "forward", route)
    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeTopKRouter, "forward", route)


@pytest.mark.parametrize("growth", [{}, GROWTH], ids=["as wide", "wider and deeper"])
@pytest.mark.parametrize(("new", "experts", "chosen", "ffn"), [("copy", 5, 2, None), ("virtual-groups", 15, 10, 50)])
@pytest.mark.parametrize(("dense", "mixture"), PAIRS)
def test_the_function_stays(fp64_norms, tmp_path: Path, dense, mixture, new, experts, chosen, ffn, growth):
    """250 neurons: five copies of all, or three times five parts of 50. The router picks two whole FFNs."""
    architecture = small_architecture(dense, tie_word_embeddings=dense == "qwen3")
    source = drawn_model(architecture)
    grown = grown_tensors(model_checkpoint(architecture, source), upcycling(mixture, experts, chosen, new, ffn, growth))
    assert grown.plan.function_preserving and not grown.plan.dropped
    model = published(grown, tmp_path)
    assert type(model).__name__ == mixtures()[mixture].class_name
    assert relative_difference(source, model) <= 1e-12


def test_unmodified_transformers_keeps_it_to_fp32s_rounding(tmp_path: Path):
    architecture = small_architecture("qwen3")
    source = drawn_model(architecture)
    grown = grown_tensors(model_checkpoint(architecture, source), upcycling("qwen3_moe"))
    assert relative_difference(source, published(grown, tmp_path)) <= 1e-6


def test_virtual_groups_have_one_router_row_and_their_part_of_the_neurons():
    architecture = small_architecture("llama")
    source = model_checkpoint(architecture, drawn_model(architecture))
    grown = grown_tensors(source, upcycling("mixtral", 15, 5, "virtual-groups", 50))
    router = whole(grown, "model.layers.1.mlp.gate.weight")
    assert all(torch.equal(router[5 * group], router[5 * group + part]) for group in range(3) for part in range(5))
    assert len({tuple(row.tolist()) for row in router}) == 3
    assert abs(float(router.std()) - architecture.config["initializer_range"]) < 0.003
    inside, outside = "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
    for expert in (0, 7, 14):
        part = slice(50 * (expert % 5), 50 * (expert % 5) + 50)
        name = f"model.layers.1.block_sparse_moe.experts.{expert}"
        assert torch.equal(whole(grown, f"{name}.w3.weight"), source.read(inside)[part])
        torch.testing.assert_close(whole(grown, f"{name}.w2.weight"), 5 * source.read(outside)[:, part])
    part = grown.read("model.layers.1.mlp.gate.weight", "weight", ((4, 12), (3, 40)))
    assert torch.equal(part, router[4:12, 3:40])


def test_dropped_neurons_start_from_the_statistics_of_what_they_replace(fp64_norms, tmp_path: Path):
    """Drop-upcycling as published: half of the neurons, others in each expert, normal with their mean and deviation."""
    architecture = small_architecture("qwen3")
    model = drawn_model(architecture)
    for name, parameter in model.named_parameters():
        if "mlp" in name:
            parameter.data.add_(0.03)  # a mean that shows
    source = model_checkpoint(architecture, model)
    grown = grown_tensors(source, upcycling("qwen3_moe", new="drop"))
    assert grown.plan.inexact == (
        "experts.new: drop does not keep the source's function: part of every expert starts anew",
    )
    assert relative_difference(model, published(grown, tmp_path)) > 1e-3
    replaced = []
    for expert in range(5):
        up, down = (
            whole(grown, f"model.layers.2.mlp.experts.{expert}.{name}.weight") for name in ("up_proj", "down_proj")
        )
        old_up, old_down = (source.read(f"model.layers.2.mlp.{name}.weight") for name in ("up_proj", "down_proj"))
        new = (up != old_up).any(dim=1)
        assert int(new.sum()) == 125 and torch.equal(new, (down != old_down).any(dim=0))
        for found, old in ((up[new], old_up[new]), (down[:, new], old_down[:, new])):
            assert abs(float(found.mean() - old.mean())) < 0.003 and abs(float(found.std() / old.std()) - 1) < 0.03
        replaced.append(tuple(new.tolist()))
    assert len(set(replaced)) == 5


@pytest.mark.parametrize(("new", "experts", "ffn"), [("copy", 4, None), ("virtual-groups", 10, 50), ("drop", 4, None)])
@pytest.mark.parametrize(("dense", "mixture"), PAIRS)
def test_any_slice_is_the_slice_of_the_whole(dense, mixture, new, experts, ffn):
    architecture = small_architecture(dense)
    source = model_checkpoint(architecture, drawn_model(architecture, torch.float32))
    grown = grown_tensors(source, upcycling(mixture, experts, 5 if ffn else 2, new, ffn, GROWTH))
    generator = torch.Generator().manual_seed(1)
    for spec in grown.plan.target.stored:
        bounds = tuple(random_part(size, generator) for size in spec.shape)
        expected = whole(grown, spec.name)[tuple(slice(*part) for part in bounds)]
        assert torch.equal(grown.read(spec.name, "weight", bounds), expected), spec.name


@pytest.mark.parametrize(("dense", "mixture"), PAIRS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.sampled_from([1, 2, 5, 10]),
    groups=st.integers(1, 3),
    chosen=st.integers(1, 3),
    heads=st.sampled_from([(6, 3), (12, 6), (9, 3)]),
    layers=st.integers(3, 4),
    tied=st.booleans(),
)
def test_any_mixture_keeps_the_function(
    fp64_norms, tmp_path: Path, dense, mixture, parts, groups, chosen, heads, layers, tied: bool
):
    """``groups`` whole FFNs, each in ``parts`` experts. The router picks whole FFNs."""
    architecture = small_architecture(dense, tie_word_embeddings=tied)
    source = drawn_model(architecture)
    growth = {
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "num_hidden_layers": layers,
        "hidden_size": 180,
    }
    new, picked = ("copy" if parts == 1 else "virtual-groups"), min(chosen, groups) * parts
    recipe = upcycling(mixture, groups * parts, picked, new, None if parts == 1 else 250 // parts, growth)
    grown = grown_tensors(model_checkpoint(architecture, source), recipe)
    assert grown.plan.function_preserving
    assert relative_difference(source, published(grown, Path(mkdtemp(dir=tmp_path)))) <= 1e-12


@pytest.mark.parametrize(("dense", "mixture"), PAIRS)
def test_a_growth_and_then_a_mixture_keep_the_function(fp64_norms, tmp_path: Path, dense, mixture):
    """One expert that is always picked is the dense model; a grown model becomes a mixture as any other."""
    architecture = small_architecture(dense)
    model = drawn_model(architecture)
    first = grown_tensors(model_checkpoint(architecture, model), recipe_of(target={**GROWTH, "intermediate_size": 300}))
    middle = model_checkpoint(first.plan.target, grown_model(first))
    for experts, chosen in ((1, 1), (4, 2)):
        grown = grown_tensors(middle, upcycling(mixture, experts, chosen))
        folder = tmp_path / str(experts)
        folder.mkdir()
        assert relative_difference(model, published(grown, folder)) <= 1e-12


@pytest.mark.parametrize(
    ("dense", "recipe", "message"),
    [
        ("llama", upcycling("qwen3_moe"), "llama cannot become qwen3_moe; it can become mixtral"),
        ("gpt2", upcycling("mixtral"), "gpt2 cannot become mixtral; it can become nothing"),
        (
            "llama",
            upcycling("mixtral", ffn=125),
            "experts.new: copy makes experts of the source's 250 neurons; set 250",
        ),
        (
            "llama",
            upcycling("mixtral", 10, 5, "virtual-groups", 60),
            "60 does not divide the source's 250 neurons; nearest sizes that work: 50, 125|: 50, 25|25, 50",
        ),
        (
            "llama",
            upcycling("mixtral", 12, 5, "virtual-groups", 50),
            "num_local_experts: 12 is not a multiple of the 5 experts that make up one dense FFN; nearest: 10 or 15",
        ),
        (
            "llama",
            upcycling("mixtral", 10, 4, "virtual-groups", 50),
            "num_experts_per_tok: 4 is not a multiple of the 5 .*; nearest: 5",
        ),
        ("llama", upcycling("mixtral", 2, 3), "num_experts_per_tok: 3 exceeds num_local_experts 2"),
        ("llama", upcycling("mixtral", 2, 0), "num_experts_per_tok: expected a positive whole number, found 0"),
        ("llama", upcycling("mixtral", 5000), "num_local_experts: 5,000 is more than the 4,096 that a plan can hold"),
        ("qwen3", upcycling("qwen3_moe", growth={"norm_topk_prob": False}), "norm_topk_prob is False; .* True only"),
        (
            "llama",
            upcycling("mixtral", growth={"experts": 3}),
            "target.experts: not a config field of llama or mixtral",
        ),
        (
            "llama",
            upcycling("mixtral", new="drop", function_preserving="required"),
            "function_preserving: required, but experts.new: drop",
        ),
    ],
)
def test_what_cannot_be_is_refused(dense, recipe, message: str):
    with pytest.raises(GrowthError, match=message):
        plan_growth(small_architecture(dense), recipe)


def test_biases_and_other_formats_are_refused():
    with pytest.raises(GrowthError, match="the source's mlp_bias is True; it becomes a mixtral with False only"):
        plan_growth(small_architecture("llama", mlp_bias=True), upcycling("mixtral"))
    native = recipe_of(target={"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})
    with pytest.raises(
        GrowthError, match="written as a Hugging Face folder of weights: set layout.format: huggingface and"
    ):
        plan_growth(small_architecture("llama"), native)


@pytest.mark.parametrize(("dense", "mixture"), PAIRS)
def test_every_field_of_the_dense_config_has_a_place(dense, mixture):
    family, origin = mixtures()[mixture], mixtures()[mixture].upcycles[dense]
    fields = small_architecture(dense).family.effective_fields
    placed = family.known_fields | set(origin.only) | set(origin.without_effect) | {"intermediate_size"}
    assert fields <= placed
    named = set(origin.only) | set(origin.without_effect)
    assert named <= fields


def test_what_a_token_of_a_mixture_passes_through():
    source = small_architecture("llama")
    plan = plan_growth(source, upcycling("mixtral"))
    sizes, config = plan.target.sizes, plan.target.config
    expert = 3 * sizes["hidden"] * sizes["ffn"]
    idle = (sizes["experts"] - config["num_experts_per_tok"]) * expert * sizes["layers"]
    assert plan.target.active_parameters == plan.target.num_parameters - idle < plan.target.num_parameters
    assert source.active_parameters == source.num_parameters
    idle_flops = training_flops_per_token(plan.target, 16) - 6 * (plan.target.active_parameters - lookups(plan.target))
    assert idle_flops == 12 * sizes["layers"] * sizes["heads"] * sizes["head_dim"] * 16


def lookups(architecture):
    """Elements that multiply no token: embeddings that are not tied, and norms."""
    return sum(spec.numel for spec in architecture.stored if not spec.is_matrix or spec.role == "embedding")
