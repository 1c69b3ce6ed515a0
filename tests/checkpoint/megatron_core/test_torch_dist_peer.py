"""megatron-core's own GPTModel, optimizers and scheduler load what is written, and what they save is read back equal."""

from pathlib import Path

import pytest
import torch
import yaml
from megatron_core_ranks import LENGTH, SIZES, VOCABULARY
from megatron_core_training import Case, trained
from transformers import AutoModelForCausalLM

from incr_ds.arch.architecture import architecture_from_config
from incr_ds.checkpoint.base import STATES
from incr_ds.checkpoint.huggingface.export import export_huggingface
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.offline.plan import GrowthRequest, plan_files, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.checkpoint import MemoryCheckpoint, drawn_checkpoint
from incr_ds.testing.processes import run_processes

CONFIG = {
    "hidden_size": SIZES["hidden_size"],
    "intermediate_size": SIZES["ffn_hidden_size"],
    "num_hidden_layers": SIZES["num_layers"],
    "num_attention_heads": SIZES["num_attention_heads"],
    "num_key_value_heads": SIZES["num_query_groups"],
    "head_dim": 4,
    "max_position_embeddings": LENGTH,
    "vocab_size": VOCABULARY - 3,
    "rms_norm_eps": 1e-5,
}
UNPADDED = {"vocab_size": CONFIG["vocab_size"]}
LAYOUT = {"format": "torch_dist", "vocabulary_multiple": 8}


def same(one, other, states=STATES):
    assert (one.facts.step, one.architecture.tied) == (other.facts.step, other.architecture.tied)
    for spec in one.architecture.stored:
        for state in states:
            assert torch.equal(one.read(spec.name, state), other.read(spec.name, state)), (spec.name, state)


def logits_by_transformers(source, folder):
    export_huggingface(source, folder / "exported", torch.float32, folder / "none")
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", attn_implementation="eager")
    with torch.no_grad():
        return model(torch.arange(LENGTH)[None] * 3 % CONFIG["vocab_size"]).logits


def drawn(family, **further):
    """Weights and moments that are all drawn; norms around 1."""
    architecture = architecture_from_config({"model_type": family, **CONFIG, **further}, "test")
    weights, first, second = (drawn_checkpoint(architecture, seed) for seed in range(3))
    tensors = {
        spec.name: (weights.read(spec.name), first.read(spec.name), second.read(spec.name).square())
        for spec in architecture.stored
    }
    by_state = {state: {name: states[i] for name, states in tensors.items()} for i, state in enumerate(STATES)}
    return MemoryCheckpoint(architecture, by_state, step=100)


def write(source, folder, **layout):
    """The folder of the iteration that is written from an opened source."""
    folder.parent.mkdir(exist_ok=True)
    recipe = folder.with_name(f"{folder.name}.yaml")
    recipe.write_text("target: {}\n")
    asked = parse_settings({"target": {}, "layout": {**LAYOUT, **layout}}, GrowthRecipe, "test")
    grow_checkpoint(plan_files(GrowthRequest(folder.parent, recipe, folder), source, asked))
    return open_source(folder).facts.path


def test_two_tensor_ranks_load_masters_moments_and_step(tmp_path: Path):
    """Megatron-core's distributed optimizer in fp32, whose model then computes what transformers' does."""
    source = drawn("llama")
    case = Case(write(source, tmp_path / "ours", tensor_parallel=2), tmp_path / "theirs", 0, (2, 1), further=UNPADDED)
    ranks = run_processes(trained, 2, [case])
    assert [keys for [(_, keys)] in ranks] == [(set(), set())] * 2
    logits = torch.cat([logits for [(logits, _)] in ranks], dim=-1)[..., : CONFIG["vocab_size"]]
    same(open_source(tmp_path / "theirs"), source)
    assert logits.std() > 0.02
    torch.testing.assert_close(logits, logits_by_transformers(source, tmp_path), rtol=1e-4, atol=1e-5)


BF16 = {"params_dtype": torch.bfloat16}
OTHERS = {
    "qwen2": ({"tie_word_embeddings": True}, {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False}),
    "qwen3": ({}, {"qk_layernorm": True}),
}


@pytest.mark.slow
def test_a_run_of_megatron_core_goes_on_from_what_is_written(tmp_path: Path):
    """In bf16 with fp32 masters, over 2 x 2 ranks: what is written replaces Megatron-core's own checkpoint bit for bit."""
    run_processes(trained, 4, [Case(None, tmp_path / "own", 3, (1, 2), further=BF16)])
    own = open_source(tmp_path / "own")
    assert (own.facts.step, own.facts.dtype) == (4, "bfloat16")
    recipe = {"target": {}, "layout": {**LAYOUT, "tensor_parallel": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    grow_checkpoint(plan_request(GrowthRequest(tmp_path / "own", tmp_path / "recipe.yaml", tmp_path / "ours")))
    ours = open_source(tmp_path / "ours")
    same(ours, own)
    kept = [Case(ours.facts.path, tmp_path / f"kept{d}", 0, d, further=BF16) for d in ((2, 2), (2, 1), (1, 2))]
    kept += [Case(own.facts.path, tmp_path / "kept by itself", 0, (2, 2), further=BF16)]
    kept += [Case(ours.facts.path, tmp_path / "not distributed", 0, (2, 2), distributed=False, further=BF16)]
    sources = {name: drawn(name, **config) for name, (config, _) in OTHERS.items()}
    others = [
        Case(
            write(source, tmp_path / name / "ours"),
            tmp_path / name / "theirs",
            0,
            (2, 1),
            further=OTHERS[name][1] | UNPADDED,
        )
        for name, source in sources.items()
    ]
    steps = [Case(s.facts.path, tmp_path / f"step{n}", 2, (2, 1), further=BF16) for n, s in enumerate((own, ours))]
    ranks = run_processes(trained, 4, [*kept, *others, *steps], timeout=500)
    assert not any(unexpected for found in ranks for _, (_, unexpected) in found)
    for case in kept:
        same(open_source(case.folder), own)
    for name, source in sources.items():
        same(open_source(tmp_path / name / "theirs"), source)
    one, other = (open_source(case.folder) for case in steps)
    assert one.facts.step == 6
    same(one, other)
    assert not torch.equal(one.read("model.norm.weight"), own.read("model.norm.weight"))
