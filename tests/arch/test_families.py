"""Every family from a folder that transformers wrote to a grown folder that transformers loads, through the public functions."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import incr_ds
from incr_ds.arch.architecture import architecture_from_config
from incr_ds.arch.family import families
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError, GrowthError, LayoutError
from incr_ds.offline.compare import random_batches
from incr_ds.sharding.placement import check_layout
from incr_ds.testing.memory import drawn_model, small_architecture


@pytest.fixture
def request_for(tmp_path: Path):
    def write(family, layout="{format: huggingface}"):
        architecture = small_architecture(family, initializer_range=0.05)
        drawn_model(architecture, torch.float32).save_pretrained(tmp_path / "source")
        axes = architecture.family.axes
        target = {axes["hidden"]: 192, axes["heads"]: 12, axes["ffn"]: 331, axes["layers"]: 4}
        if "kv_heads" in axes:
            target[axes["kv_heads"]] = 6
        text = f"target: {target}\nwidth: {{heads: {{new: copy}}}}\noptimizer: reset\nlayout: {layout}\n"
        text += "function_preserving: required\n"
        (tmp_path / "recipe.yaml").write_text(text)
        return incr_ds.GrowthRequest(tmp_path / "source", tmp_path / "recipe.yaml", tmp_path / "grown")

    return write


@pytest.mark.parametrize("family", sorted(families()))
def test_transformers_writes_and_loads(request_for, family: str):
    request = request_for(family)
    incr_ds.grow_checkpoint(incr_ds.plan_request(request))
    tokens = random_batches(101, 2, 12)
    compared = incr_ds.compare(incr_ds.open_source(request.source), incr_ds.open_source(request.output), tokens)
    assert compared.relative_difference <= 2e-5
    model = AutoModelForCausalLM.from_pretrained(request.output, dtype=torch.float32).eval()
    source = AutoModelForCausalLM.from_pretrained(request.source, dtype=torch.float32).eval()
    assert model.num_parameters() > 2 * source.num_parameters()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[0]).logits, source(tokens[0]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dense", "mixture", "ffn"), [("llama", "mixtral", 250), ("qwen3", "qwen3_moe", 125)])
def test_a_mixture_is_published_and_proved(request_for, dense, mixture, ffn):
    request = request_for(dense)
    field, new = ("intermediate_size", "copy") if ffn == 250 else ("moe_intermediate_size", "virtual-groups")
    target = (
        f"{{model_type: {mixture}, num_local_experts: 6, num_experts_per_tok: 2, {field}: {ffn}, hidden_size: 150}}"
    )
    layout = "layout: {format: huggingface}\noptimizer: reset\nfunction_preserving: required\n"
    request.recipe.write_text(f"target: {target}\nexperts: {{new: {new}}}\n{layout}")
    incr_ds.grow_checkpoint(incr_ds.plan_request(request))
    source, grown = incr_ds.open_source(request.source), incr_ds.open_source(request.output)
    assert grown.architecture.sizes["experts"] == 6 and grown.architecture.sizes["ffn"] == ffn
    compared = incr_ds.compare(source, grown, random_batches(101, 2, 12))
    assert compared.relative_difference <= 2e-5


def test_families_without_training_modules_have_no_parallel_layout():
    known = small_architecture("gpt2")
    untrained = replace(known, family=known.family.model_copy(update={"training_supported": False}))
    with pytest.raises(
        LayoutError, match="gpt2 does not support tensor or pipeline parallelism here; use tensor_parallel: 1"
    ):
        check_layout(untrained, ParallelLayout(pipeline_parallel=2))
    check_layout(untrained, ParallelLayout(data_parallel=2))


def test_hidden_and_heads_grow_together_where_the_head_size_follows(request_for):
    request = request_for("gpt2")
    request.recipe.write_text("target: {n_embd: 150}\noptimizer: reset\n")
    message = r"n_embd 150 with n_head 6 does not keep the head size of 16.*n_head: 9 with n_embd: 144; n_head: 10 with"
    with pytest.raises(GrowthError, match=message):
        incr_ds.plan_request(request)


def published_as(folder, model, config):
    """A folder as its authors published it: ``model``'s weights beside their own config.json."""
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))


SMOLLM2 = {  # HuggingFaceTB/SmolLM2-135M, sizes shrunk
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 96,
    "is_llama_config": True,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "vocab_size": 101,
}


def test_the_targets_config_is_the_sources_with_what_changed(tmp_path: Path):
    """Fields that nothing reads are kept, and no field is added that the source does not have."""
    given = {key: value for key, value in SMOLLM2.items() if key not in ("rope_interleaved", "is_llama_config")}
    published_as(tmp_path / "source", drawn_model(architecture_from_config(given, "test"), torch.float32), SMOLLM2)
    request = incr_ds.GrowthRequest(tmp_path / "source", tmp_path / "recipe.yaml", tmp_path / "grown")
    target = "target: {hidden_size: 72, num_attention_heads: 12, num_key_value_heads: 6, num_hidden_layers: 4}"
    request.recipe.write_text(
        f"{target}\noptimizer: reset\nfunction_preserving: required\nlayout: {{format: huggingface}}\n"
    )
    planned = incr_ds.plan_request(request)
    note = "config.json: is_llama_config: transformers 5.* does not read this for a llama, so it has no effect; .*"
    assert any(re.fullmatch(note, text) for text in planned.notes)
    incr_ds.grow_checkpoint(planned)
    written = json.loads((request.output / "config.json").read_text())
    grown = {"hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 6, "num_hidden_layers": 4}
    # 72 / 12 is not the heads' 8, which transformers would take.
    assert written == SMOLLM2 | grown | {"head_dim": 8, "torch_dtype": "float32"}
    tokens = random_batches(101, 1, 12)[0]
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (request.source, request.output)
    ]
    with torch.no_grad():
        first, second = (model.eval()(tokens).logits for model in models)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)


def test_a_misspelt_target_is_told_with_the_recipes_other_mistakes(request_for):
    request = request_for("llama")
    request.recipe.write_text("target: {hiden_size: 192, num_layers: 4}\nwidht: {}\n")
    with pytest.raises(ConfigError) as refusal:
        incr_ds.plan_request(request)
    lines = str(refusal.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["widht", "target.hiden_size", "target.num_layers"]
    assert "did you mean width?" in lines[0] and "did you mean hidden_size?" in lines[1]
    request.recipe.write_text("target: {hiden_size: 192, intermediate_size: 3, hidden_act: gelu}\n")
    with pytest.raises(GrowthError) as refusal:
        incr_ds.plan_request(request)
    assert [line.split(": ")[1] for line in str(refusal.value).splitlines()] == [
        "target.hiden_size",
        "target.hidden_act",
    ]
