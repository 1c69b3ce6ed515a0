"""megatron-core's own GPTModel, optimizers and scheduler load the files of the format torch, and go on from them."""

from pathlib import Path

import pytest
import torch
import yaml
from megatron_core_ranks import GPT2, GPT_NEOX, LENGTH, MIXTRAL, SIZES
from megatron_core_training import RELEASE
from megatron_rank_loading import Case, loaded_by_ranks
from megatron_rank_training import saved_by_ranks
from packaging.version import Version
from transformers import AutoModelForCausalLM
from truths import same_values

from incr_ds.arch.architecture import architecture_from_config
from incr_ds.arch.family import family_of
from incr_ds.checkpoint.huggingface.export import export_huggingface
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.offline.plan import GrowthRequest, plan_files, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.checkpoint import MemoryCheckpoint, drawn_checkpoint
from incr_ds.testing.processes import run_processes

LAYOUT = {"format": "torch", "vocabulary_multiple": 2, "transformer_impl": "local"}
if RELEASE >= Version("0.19"):
    LAYOUT["learning_rates"] = [1e-3, 1e-3]  # by which it finds parameter groups
# Megatron-LM sets the second argument if the first is bf16.
BF16 = {"params_dtype": torch.bfloat16, "accumulate_allreduce_grads_in_fp32": True}
TIED = {"untie_embeddings_and_output_weights": False}
DISTRIBUTED = {"use_distributed_optimizer": True}
PROVIDED = {
    "hidden_size": SIZES["hidden_size"],
    "intermediate_size": SIZES["ffn_hidden_size"],
    "num_hidden_layers": SIZES["num_layers"],
    "num_attention_heads": SIZES["num_attention_heads"],
    "num_key_value_heads": SIZES["num_query_groups"],
    "head_dim": 4,
    "max_position_embeddings": LENGTH,
    "vocab_size": 29,
    "rms_norm_eps": 1e-5,
}
UNPADDED = {"vocab_size": PROVIDED["vocab_size"]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gpt_neox": {"use_parallel_residual": False, "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "gpt2": {"n_embd": 16, "n_inner": 24, "n_layer": 4, "n_head": 4, "n_positions": LENGTH},
    "mixtral": {"num_local_experts": 4, "rope_parameters": ROPE, "intermediate_size": 20},
}
ROWS = {1: 30, 2: 32}  # of the padded vocabulary, by tensor ranks
# The family, degrees, and arguments of Megatron-LM.
CASES = {
    "in fp32": ("llama", (2, 1), {}),
    "with biases and a copy of the embedding": ("qwen2", (1, 2), {"add_qkv_bias": True} | BF16 | TIED),
    "with norms of q and k": ("qwen3", (2, 2), {"qk_layernorm": True} | BF16),
    "with LayerNorm": ("gpt_neox", (2, 1), GPT_NEOX),
    "with positions": ("gpt2", (2, 2), GPT2 | BF16),
    "with experts": ("mixtral", (1, 2), MIXTRAL | BF16),
    "distributed, in fp32": ("llama", (2, 1), DISTRIBUTED),
    "distributed, with a copy whose bucket ends unpadded": (
        "qwen2",
        (1, 2),
        {"add_qkv_bias": True} | TIED | DISTRIBUTED,
    ),
    "distributed, over two dimensions": ("qwen3", (2, 2), {"qk_layernorm": True} | BF16 | DISTRIBUTED),
}
# Before 0.16, it numbers the parameters of later stages of local modules in another order.
NUMBERS = RELEASE >= Version("0.16")


def is_loaded(degrees, further):
    return NUMBERS or degrees[1] == 1 or "use_distributed_optimizer" in further


def drawn(family):
    """Weights and moments that are all drawn; norms around 1. The weights of a model in bf16 are rounded masters."""
    known = {field: size for field, size in PROVIDED.items() if field in family_of(family, "test").known_fields}
    architecture = architecture_from_config({"model_type": family, **known, **CONFIGS[family]}, "test")
    weights, first, second = (drawn_checkpoint(architecture, seed) for seed in range(3))
    by_state = {
        "weight": {spec.name: weights.read(spec.name) for spec in architecture.stored},
        "exp_avg": {spec.name: first.read(spec.name) for spec in architecture.stored},
        "exp_avg_sq": {spec.name: second.read(spec.name).square() for spec in architecture.stored},
    }
    return MemoryCheckpoint(architecture, by_state, step=100)


def layout_of(degrees, further, **changes):
    dtype = "bfloat16" if "params_dtype" in further else "float32"
    distributed = further.get("use_distributed_optimizer", False)
    parallel = {"tensor_parallel": degrees[0], "pipeline_parallel": degrees[1]}
    return {**LAYOUT, **parallel, "dtype": dtype, "distributed_optimizer": distributed, **changes}


def write(source, folder, layout, optimizer="rescale"):
    """The folder of the iteration that is written from an opened source."""
    folder.parent.mkdir(exist_ok=True)
    recipe = folder.with_name(f"{folder.name}.yaml")
    recipe.write_text("target: {}\n")
    asked = parse_settings({"target": {}, "optimizer": optimizer, "layout": layout}, GrowthRecipe, "test")
    grow_checkpoint(plan_files(GrowthRequest(folder.parent, recipe, folder), source, asked))
    return open_source(folder).facts.path


def same_source(one, other):
    assert (one.facts.step, one.architecture.tied) == (other.facts.step, other.architecture.tied)
    same_values(one, other)


def same_logits(of_ranks, source, folder):
    """Whether the parts of tensor ranks are transformers' logits."""
    export_huggingface(source, folder / "exported", torch.float32, folder / "none")
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", attn_implementation="eager")
    model.eval()
    with torch.no_grad():
        expected = model(torch.arange(LENGTH)[None] * 3 % 32).logits
    found = torch.cat(of_ranks, dim=-1)[..., : PROVIDED["vocab_size"]]
    assert found.std() > 0.02
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_ranks_load_weights_masters_moments_and_step(tmp_path: Path):
    """What Megatron-core's ranks load and save again is read back bit for bit. A folder `release` gives them the weights."""
    loaded = {name: case for name, case in CASES.items() if is_loaded(*case[1:])}
    sources = {name: drawn(family) for name, (family, *_) in loaded.items()}
    cases = {}
    for name, (_, degrees, further) in loaded.items():
        ours = write(sources[name], tmp_path / name / "ours", layout_of(degrees, further))
        cases[name] = Case(ours, tmp_path / name / "theirs", degrees, further | UNPADDED, vocabulary=ROWS[degrees[0]])
    release = write(sources["in fp32"], tmp_path / "release", layout_of((2, 1), {}), "reset")
    assert release.name == "release"
    weights = Case(release, tmp_path / "from weights", (2, 1), UNPADDED, vocabulary=ROWS[2])
    ranks = run_processes(loaded_by_ranks, 4, [*cases.values(), weights], timeout=900)
    for number, (name, case) in enumerate(cases.items()):
        same_source(open_source(case.folder), sources[name])
        if case.degrees == (2, 1):
            same_logits([rank[number] for rank in ranks[:2]], sources[name], case.folder)
    started = open_source(weights.folder)
    for spec in started.architecture.stored:
        assert torch.equal(started.read(spec.name), sources["in fp32"].read(spec.name)), spec.name


@pytest.mark.slow
def test_ranks_go_on_as_from_megatron_core_s_own_files(tmp_path: Path):
    """What is written from Megatron-core's own files replaces them, bit for bit, over two steps of training."""
    kinds = {"mixed": ((2, 2 if NUMBERS else 1), BF16), "distributed": ((1, 2), TIED | BF16 | DISTRIBUTED)}
    run_processes(saved_by_ranks, 4, [(tmp_path / name, *kind) for name, kind in kinds.items()], timeout=500)
    cases = []
    for name, (degrees, further) in kinds.items():
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump({"target": {}, "layout": layout_of(degrees, further)}))
        grow_checkpoint(plan_request(GrowthRequest(tmp_path / name, recipe, tmp_path / f"{name}, ours")))
        starts = [open_source(tmp_path / start).facts.path for start in (name, f"{name}, ours")]
        cases += [Case(start, tmp_path / f"{name}{n}", degrees, further, 2) for n, start in enumerate(starts)]
    run_processes(loaded_by_ranks, 4, cases, timeout=500)
    for name, theirs, ours in zip(kinds, cases[::2], cases[1::2], strict=True):
        own, one, other = (open_source(folder) for folder in (tmp_path / name, theirs.folder, ours.folder))
        assert (own.facts.step, one.facts.step) == (2, 4)
        same_source(one, other)
        assert not torch.equal(one.read("model.norm.weight"), own.read("model.norm.weight"))
