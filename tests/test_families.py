"""Every family from a folder that transformers wrote to a grown folder that transformers loads, through the public functions."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import incr_ds
from incr_ds.arch.family import families
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import GrowthError, LayoutError
from incr_ds.target.placement import check_layout
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.verify import random_batches


@pytest.fixture
def request_for(tmp_path):
    def write(family, layout="{format: huggingface}"):
        architecture = small_architecture(family, initializer_range=0.05)
        drawn_model(architecture, torch.float32).save_pretrained(tmp_path / "source")
        axes = architecture.family.axes
        target = {axes["hidden"]: 192, axes["heads"]: 12, axes["ffn"]: 331, axes["layers"]: 4}
        if "kv_heads" in axes:
            target[axes["kv_heads"]] = 6
        text = (
            f"target: {target}\nwidth: {{heads: {{new: copy}}}}\noptimizer: reset\nexact: required\nlayout: {layout}\n"
        )
        (tmp_path / "recipe.yaml").write_text(text)
        return incr_ds.GrowthRequest(tmp_path / "source", tmp_path / "recipe.yaml", tmp_path / "grown")

    return write


@pytest.mark.parametrize("family", sorted(families()))
def test_transformers_writes_and_loads(request_for, family):
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
    layout = "layout: {format: huggingface}\noptimizer: reset\nexact: required\n"
    request.recipe.write_text(f"target: {target}\nexperts: {{new: {new}}}\n{layout}")
    incr_ds.grow_checkpoint(incr_ds.plan_request(request))
    source, grown = incr_ds.open_source(request.source), incr_ds.open_source(request.output)
    assert grown.architecture.sizes["experts"] == 6 and grown.architecture.sizes["ffn"] == ffn
    compared = incr_ds.compare(source, grown, random_batches(101, 2, 12))
    assert compared.relative_difference <= 2e-5


def test_families_without_training_modules_have_no_parallel_layout():
    known = small_architecture("gpt2")
    untrained = replace(known, family=known.family.model_copy(update={"trains": False}))
    with pytest.raises(LayoutError, match="gpt2 has no tensor- or pipeline-parallel form here; use tensor_parallel: 1"):
        check_layout(untrained, ParallelLayout(pipeline_parallel=2))
    check_layout(untrained, ParallelLayout(data_parallel=2))


def test_hidden_and_heads_grow_together_where_the_head_size_follows(request_for):
    request = request_for("gpt2")
    request.recipe.write_text("target: {n_embd: 150}\noptimizer: reset\n")
    message = r"n_embd 150 with n_head 6 does not keep the head size of 16.*n_head: 9 with n_embd: 144; n_head: 10 with"
    with pytest.raises(GrowthError, match=message):
        incr_ds.plan_request(request)
