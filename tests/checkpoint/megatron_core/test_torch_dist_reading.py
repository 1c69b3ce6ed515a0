"""The reader against what megatron-core itself saves."""

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from gpt2_parameters import layer_parameters, local_name
from megatron_core_ranks import GPT2, GPT_NEOX, LENGTH, MIXTRAL, QWEN3_MOE, VOCABULARY, loaded, saved
from transformers import AutoModelForCausalLM

from incr_ds.checkpoint.base import STATES
from incr_ds.checkpoint.huggingface.export import export_huggingface
from incr_ds.checkpoint.opening import open_source
from incr_ds.testing.processes import run_processes

FAMILIES = {
    "llama": {},
    "qwen2": {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False},
    "qwen3": {"qk_layernorm": True, "kv_channels": 8},
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """Saves each family once: its folder, and the model's own logits and Adam's states."""

    @cache
    def save(family: str) -> tuple[Path, torch.Tensor, dict]:
        folder = tmp_path_factory.mktemp(family)
        ((logits, moments),) = run_processes(saved, 1, folder, FAMILIES[family])
        return folder, logits, moments

    return save


def same_logits(source, logits, folder):
    export_huggingface(source, folder / "exported", torch.float32, source.facts.path)
    eager = {"experts_implementation": "eager"} if source.architecture.family.joined else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", attn_implementation="eager", **eager)
    tokens = torch.arange(LENGTH)[None] * 3 % VOCABULARY
    with torch.no_grad():
        found = model(tokens).logits
    assert logits.std() > 0.02
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)


def grouped(source, layer, state, end):
    """q, k and v of a layer, as Megatron-core holds them: for each key-value group its queries, its key, its value."""
    parts = [source.read(f"model.layers.{layer}.self_attn.{x}_proj.{end}", state) for x in "qkv"]
    groups = source.architecture.sizes["kv_heads"]
    return torch.cat([part.view(groups, -1, *part.shape[1:]) for part in parts], dim=1).flatten(0, 1)


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != "llama")]
)
def test_transformers_computes_what_megatron_core_did(peer, family, tmp_path):
    folder, logits, _ = peer(family)
    source = open_source(folder)
    assert source.architecture.family.model_type == family
    assert source.architecture.tied == (family in ("qwen2", "gpt2"))
    same_logits(source, logits, tmp_path)


@pytest.mark.parametrize("family", ["llama", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_moments_masters_and_step_are_the_optimizer_s(peer, family):
    folder, _, moments = peer(family)
    source = open_source(folder)
    assert source.facts.step == 3 and source.facts.recorded.global_steps == 3
    assert source.facts.recorded.global_samples == 96
    for index, state in enumerate(("exp_avg", "exp_avg_sq", "weight")):
        for layer in range(4):
            inside = f"decoder.layers.{layer}."
            expected = moments[f"{inside}self_attention.linear_qkv.weight"][index]
            assert torch.equal(grouped(source, layer, state, "weight"), expected)
            if family == "qwen2":
                expected = moments[f"{inside}self_attention.linear_qkv.bias"][index]
                assert torch.equal(grouped(source, layer, state, "bias"), expected)
            pair = [source.read(f"model.layers.{layer}.mlp.{x}_proj.weight", state) for x in ("gate", "up")]
            assert torch.equal(torch.cat(pair), moments[f"{inside}mlp.linear_fc1.weight"][index])
            norm = source.read(f"model.layers.{layer}.post_attention_layernorm.weight", state)
            assert torch.equal(norm, moments[f"{inside}pre_mlp_layernorm.weight"][index])
        rows = source.read("model.embed_tokens.weight", state, ((5, 9), (3, 7)))
        assert torch.equal(rows, moments["embedding.word_embeddings.weight"][index][5:9, 3:7])


@pytest.mark.slow
def test_moments_and_masters_of_a_gpt2_are_the_optimizer_s(peer):
    folder, _, moments = peer("gpt2")
    source = open_source(folder)
    for index, state in enumerate(("exp_avg", "exp_avg_sq", "weight")):
        for layer in range(4):
            for name, tensor in layer_parameters(source, state, layer).items():
                expected = moments[f"decoder.layers.{layer}.{local_name(name)}"][index]
                assert torch.equal(tensor, expected), (name, state)
        positions = source.read("transformer.wpe.weight", state)
        assert torch.equal(positions, moments["embedding.position_embeddings.weight"][index])
        part = source.read("transformer.h.1.mlp.c_fc.weight", state, ((3, 11), (5, 20)))
        assert torch.equal(part, moments["decoder.layers.1.mlp.linear_fc1.weight"][index].T[3:11, 5:20])


@pytest.mark.slow
def test_moments_and_masters_of_a_qwen3_moe_are_the_optimizer_s(peer):
    folder, _, moments = peer("qwen3_moe")
    source = open_source(folder)
    for index, state in enumerate(("exp_avg", "exp_avg_sq", "weight")):
        for layer in range(4):
            inside, theirs = f"model.layers.{layer}.mlp", f"decoder.layers.{layer}.mlp"
            assert torch.equal(source.read(f"{inside}.gate.weight", state), moments[f"{theirs}.router.weight"][index])
            for expert in range(4):
                first, second = (
                    moments[f"{theirs}.experts.local_experts.{expert}.linear_fc{n}.weight"] for n in (1, 2)
                )
                own = {
                    x: source.read(f"{inside}.experts.{expert}.{x}_proj.weight", state) for x in ("gate", "up", "down")
                }
                assert torch.equal(torch.cat([own["gate"], own["up"]]), first[index]), (layer, expert, state)
                assert torch.equal(own["down"], second[index]), (layer, expert, state)
                part = source.read(f"{inside}.experts.{expert}.down_proj.weight", state, ((3, 9), (2, 11)))
                assert torch.equal(part, second[index][3:9, 2:11])
            norm = source.read(f"model.layers.{layer}.post_attention_layernorm.weight", state)
            assert torch.equal(norm, moments[f"decoder.layers.{layer}.pre_mlp_layernorm.weight"][index])


@pytest.mark.slow
def test_experts_in_one_module_are_read(tmp_path: Path):
    """Those of GroupedMLP, which has all experts in two matrices [in, out]. Megatron-core 0.19 no longer has it."""
    pytest.importorskip("megatron.core.transformer.moe.grouped_gemm_util", reason="no GroupedMLP in this release")
    ((_, moments),) = run_processes(saved, 1, tmp_path, {**MIXTRAL, "moe_grouped_gemm": True})
    source = open_source(tmp_path)
    for index, state in enumerate(("exp_avg", "exp_avg_sq", "weight")):
        for layer, expert in product(range(4), range(4)):
            first, second = (moments[f"decoder.layers.{layer}.mlp.experts.weight{n}"][index] for n in (1, 2))
            inside = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            own = [source.read(f"{inside}.w{n}.weight", state) for n in (1, 2, 3)]
            assert torch.equal(torch.cat([own[0], own[2]]).T, first.view(4, 16, 40)[expert]), (layer, expert, state)
            assert torch.equal(own[1].T, second.view(4, 20, 16)[expert]), (layer, expert, state)


def test_every_chunk_is_checked(peer):
    source = open_source(peer("llama")[0])
    assert set(source.self_check()) == {spec.name for spec in source.architecture.stored}


@pytest.mark.slow
@pytest.mark.parametrize("degrees", [(2, 1), (1, 2), (2, 2)])
def test_ranks_of_another_layout_save_the_same_tensors(peer, degrees, tmp_path):
    one = open_source(peer("llama")[0])
    run_processes(loaded, degrees[0] * degrees[1], one.facts.path, tmp_path, FAMILIES["llama"], *degrees)
    several = open_source(tmp_path)
    assert several.facts.layout == {"tensor_parallel": degrees[0], "pipeline_parallel": degrees[1]}
    assert several.facts.step == 3
    for spec in one.architecture.stored:
        for state in STATES:
            assert torch.equal(one.read(spec.name, state), several.read(spec.name, state)), (spec.name, state)
