"""megatron-core's own GPTModel, optimizers and scheduler load what is written, and what they save is read back equal."""

from pathlib import Path

import pytest
import torch
import yaml
from megatron_core_ranks import GPT2, GPT_NEOX, LENGTH, MIXTRAL, QWEN3_MOE, SIZES, VOCABULARY
from megatron_core_training import RELEASE, RESHARDABLE, Case, trained
from packaging.version import Version
from transformers import AutoModelForCausalLM

from incr_ds.arch.architecture import architecture_from_config
from incr_ds.arch.family import family_of
from incr_ds.checkpoint.base import STATES
from incr_ds.checkpoint.huggingface.export import export_huggingface
from incr_ds.checkpoint.megatron_core.keys import OF_DISTRIBUTED_OPTIMIZER
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
# Before 0.14, the optimizer of the experts looks for its state under a prefix of its own.
FINDS_EXPERTS = RELEASE >= Version("0.14")
if RELEASE >= Version("0.19"):
    LAYOUT["learning_rates"] = [1e-3, 1e-3]  # by which it finds parameter groups


def same(one, other, states=STATES):
    assert (one.facts.step, one.architecture.tied) == (other.facts.step, other.architecture.tied)
    for spec in one.architecture.stored:
        for state in states:
            assert torch.equal(one.read(spec.name, state), other.read(spec.name, state)), (spec.name, state)


def same_logits(of_ranks, source, folder):
    """Whether the parts of tensor ranks are transformers' logits."""
    export_huggingface(source, folder / "exported", torch.float32, folder / "none")
    eager = {"experts_implementation": "eager"} if source.architecture.family.joined else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", attn_implementation="eager", **eager)
    model.eval()
    with torch.no_grad():
        expected = model(torch.arange(LENGTH)[None] * 3 % CONFIG["vocab_size"]).logits
    found = torch.cat(of_ranks, dim=-1)[..., : CONFIG["vocab_size"]]
    assert found.std() > 0.02
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def drawn(family, **further):
    """Weights and moments that are all drawn; norms around 1."""
    known = {field: size for field, size in CONFIG.items() if field in family_of(family, "test").known_fields}
    architecture = architecture_from_config({"model_type": family, **known, **further}, "test")
    weights, first, second = (drawn_checkpoint(architecture, seed) for seed in range(3))
    tensors = {
        spec.name: (weights.read(spec.name), first.read(spec.name), second.read(spec.name).square())
        for spec in architecture.stored
    }
    by_state = {state: {name: states[i] for name, states in tensors.items()} for i, state in enumerate(STATES)}
    return MemoryCheckpoint(architecture, by_state, step=100)


def write(source, folder, optimizer="rescale", **layout):
    """The folder of the iteration that is written from an opened source."""
    folder.parent.mkdir(exist_ok=True)
    recipe = folder.with_name(f"{folder.name}.yaml")
    recipe.write_text("target: {}\n")
    content = {"target": {}, "optimizer": optimizer, "layout": {**LAYOUT, **layout}}
    asked = parse_settings(content, GrowthRecipe, "test")
    grow_checkpoint(plan_files(GrowthRequest(folder.parent, recipe, folder), source, asked))
    return open_source(folder).facts.path


def test_two_tensor_ranks_load_masters_moments_and_step(tmp_path: Path):
    """Megatron-core's distributed optimizer in fp32, whose model then computes what transformers' does. Before 0.15, it reads
    no other layout of the moments than its own, so there it is the optimizer that is not distributed.

    A folder `release` gives the same weights, and the optimizer its masters.
    """
    source = drawn("llama")
    ours = write(source, tmp_path / "ours", tensor_parallel=2)
    release = write(source, tmp_path / "weights", "reset", dtype="float32")
    assert release.name == "release"
    cases = [
        Case(folder, tmp_path / name, 0, (2, 1), RESHARDABLE, UNPADDED)
        for folder, name in ((ours, "theirs"), (release, "from weights"))
    ]
    ranks = run_processes(trained, 2, cases)
    for ignored, lacking in (keys for rank in ranks for _, keys in rank):
        assert not lacking and all(key.startswith(OF_DISTRIBUTED_OPTIMIZER) for key in ignored)
        assert not (ignored and RESHARDABLE)
    assert all(torch.equal(own, other) for (own, _), (other, _) in ranks)
    same(open_source(tmp_path / "theirs"), source)
    started = open_source(tmp_path / "from weights")
    for spec in source.architecture.stored:
        assert torch.equal(started.read(spec.name), source.read(spec.name)), spec.name
    same_logits([rank[0][0] for rank in ranks], source, tmp_path)


BF16 = {"params_dtype": torch.bfloat16}
OTHERS = {
    "qwen2": ({"tie_word_embeddings": True}, {"add_qkv_bias": True, "untie_embeddings_and_output_weights": False}),
    "qwen3": ({}, {"qk_layernorm": True}),
    "gpt_neox": (
        {"use_parallel_residual": False, "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        GPT_NEOX,
    ),
    "gpt2": ({"n_embd": 16, "n_inner": 24, "n_layer": 4, "n_head": 4, "n_positions": LENGTH}, GPT2),
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
    plain = Case(ours.facts.path, tmp_path / "not distributed", 0, (2, 2), distributed=False, further=BF16)
    kept = [plain, Case(own.facts.path, tmp_path / "kept by itself", 0, (2, 2), further=BF16)]
    degrees = ((2, 2), (2, 1), (1, 2))
    kept += [Case(ours.facts.path, tmp_path / f"kept{d}", 0, d, RESHARDABLE, BF16) for d in degrees]
    sources = {name: drawn(name, **config) for name, (config, _) in OTHERS.items()}
    others = [
        Case(
            write(source, tmp_path / name / "ours"),
            tmp_path / name / "theirs",
            0,
            (2, 1),
            RESHARDABLE,
            OTHERS[name][1] | UNPADDED,
        )
        for name, source in sources.items()
    ]
    theirs = own.facts.path if RESHARDABLE else plain.folder / "iter_0000003"
    starts = (theirs, ours.facts.path)
    steps = [Case(path, tmp_path / f"step{n}", 2, (2, 1), RESHARDABLE, BF16) for n, path in enumerate(starts)]
    ranks = run_processes(trained, 4, [*kept, *others, *steps], timeout=500)
    assert not any(unexpected for found in ranks for _, (_, unexpected) in found)
    for case in kept:
        same(open_source(case.folder), own)
    for number, (name, source) in enumerate(sources.items(), len(kept)):
        same(open_source(tmp_path / name / "theirs"), source)
        same_logits([rank[number][0] for rank in ranks[:2]], source, tmp_path / name)
    one, other = (open_source(case.folder) for case in steps)
    assert one.facts.step == 6
    same(one, other)
    assert not torch.equal(one.read("model.norm.weight"), own.read("model.norm.weight"))


EXPERTS = {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
MIXTURES = {
    "mixtral": ({**EXPERTS, "intermediate_size": 20}, MIXTRAL),
    "qwen3_moe": (
        {**EXPERTS, "moe_intermediate_size": 20, "num_experts_per_tok": 3, "norm_topk_prob": True, "head_dim": 8},
        QWEN3_MOE,
    ),
}


@pytest.mark.slow
def test_mixtures_are_loaded_under_any_degrees(tmp_path: Path):
    """Also with masters of bf16 weights, and with expert parallelism, under which Megatron-core chains two optimizers.

    Logits of whole tokens are transformers'.
    """
    spread = (1, 1, 2 if FINDS_EXPERTS else 1)
    cases, sources = {}, {name: drawn(name, **config) for name, (config, _) in MIXTURES.items()}
    for name, source in sources.items():
        (tmp_path / name).mkdir()
        for degrees in ((1, 1), (2, 1), (1, 2), spread):
            experts = (*degrees, 1)[2]
            layout = {"expert_parallel": experts, "tensor_parallel": degrees[0]}
            ours = write(source, tmp_path / name / f"ours{degrees}", **layout)
            theirs = tmp_path / name / f"theirs{degrees}"
            cases[name, degrees] = Case(ours, theirs, 0, degrees, RESHARDABLE, MIXTURES[name][1] | UNPADDED)
    mixed = write(sources["mixtral"], tmp_path / "mixtral/ours in bf16", expert_parallel=spread[2], dtype="bfloat16")
    further = MIXTRAL | UNPADDED | BF16
    in_bf16 = Case(mixed, tmp_path / "mixtral/theirs in bf16", 0, spread, distributed=False, further=further)
    ranks = run_processes(trained, 2, [*cases.values(), in_bf16], timeout=500)
    assert not any(lacking for rank in ranks for _, (_, lacking) in [rank[-1]])
    same(open_source(in_bf16.folder), sources["mixtral"])
    assert open_source(in_bf16.folder).facts.dtype == "bfloat16"
    for number, ((name, degrees), case) in enumerate(cases.items()):
        assert not any(lacking for rank in ranks for _, (_, lacking) in [rank[number]]), (name, degrees)
        logits = ranks[0][number][0]
        assert (logits is None) == (degrees in ((2, 1), (1, 2)))
        if logits is not None:
            same_logits([logits], sources[name], case.folder)
        same(open_source(case.folder), sources[name])
