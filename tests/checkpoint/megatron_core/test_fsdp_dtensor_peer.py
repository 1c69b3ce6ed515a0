"""The formats fsdp_dtensor and torch_dcp, as megatron-core and torch.distributed.checkpoint save them on CPU ranks."""

from functools import partial
from pathlib import Path

import pytest
import torch
from gpt2_parameters import rank_parameters
from megatron_core_ranks import GPT2, MIXTRAL
from megatron_core_training import RELEASE
from megatron_fsdp_ranks import ITERATION, Case, saved_by_fsdp, saved_by_torch_fsdp
from megatron_rank_folders import parameters_of
from packaging.version import Version
from truths import same_values

from incr_ds.arch.architecture import architecture_from_config
from incr_ds.checkpoint.base import STATES
from incr_ds.checkpoint.opening import open_source
from incr_ds.testing.checkpoint import MemoryCheckpoint, drawn_checkpoint
from incr_ds.testing.processes import run_processes

pytestmark = pytest.mark.skipif(RELEASE < Version("0.14"), reason="saves no fsdp_dtensor")
# 0.14 asks for a part of torch's device meshes that torch 2.13 does not have.
runs_with_this_torch = pytest.mark.skipif(
    RELEASE < Version("0.15"), reason="its Megatron-FSDP does not run with this torch"
)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 8,
    "vocab_size": 32,
    "rms_norm_eps": 1e-5,
}
GPT2_CONFIG = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_inner": 24,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 8,
    "vocab_size": 32,
}
MIXTRAL_CONFIG = {
    **LLAMA,
    "model_type": "mixtral",
    "intermediate_size": 20,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
LOCAL = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight"}


def drawn(config):
    architecture = architecture_from_config(config, "test")
    by_state = {
        state: {spec.name: drawn_checkpoint(architecture, seed).read(spec.name) for spec in architecture.stored}
        for seed, state in enumerate(STATES)
    }
    return MemoryCheckpoint(architecture, by_state, step=ITERATION)


def llama_rank(config, ranks, rank, _):
    """What a tensor rank holds, by the names of local modules. Ranks draw it themselves."""
    source, found = drawn(config), {}
    for state in STATES:
        held = parameters_of(source, state, (ranks, 1), rank, 0)
        found[state] = {name.replace(*next(iter(LOCAL.items()))): tensor for name, tensor in held.items()}
    return found


def gpt2_rank(config, ranks, rank, _):
    source = drawn(config)
    return {state: rank_parameters(source, state, (ranks, 1), rank, 0) for state in STATES}


def mixtral_rank(config, ranks, _, rank):
    """What one of ``ranks`` ranks of experts holds. Its experts are numbered anew."""
    source = drawn(config)
    return {state: dict(_mixtral_parameters(source, state, ranks, rank)) for state in STATES}


def _mixtral_parameters(source, state, ranks, rank):
    read, own = partial(source.read, state=state), 4 // ranks
    yield "embedding.word_embeddings.weight", read("model.embed_tokens.weight")
    for layer in range(4):
        theirs, inside = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        qkv = [read(f"{theirs}self_attn.{x}_proj.weight").view(2, -1, 16) for x in "qkv"]
        yield f"{inside}self_attention.linear_qkv.weight", torch.cat(qkv, dim=1).flatten(0, 1)
        yield f"{inside}self_attention.linear_proj.weight", read(f"{theirs}self_attn.o_proj.weight")
        yield f"{inside}input_layernorm.weight", read(f"{theirs}input_layernorm.weight")
        yield f"{inside}pre_mlp_layernorm.weight", read(f"{theirs}post_attention_layernorm.weight")
        yield f"{inside}mlp.router.weight", read(f"{theirs}mlp.gate.weight")
        for expert in range(own):
            first, down, second = (
                read(f"{theirs}block_sparse_moe.experts.{rank * own + expert}.w{n}.weight") for n in (1, 2, 3)
            )
            held = f"{inside}mlp.experts.local_experts.{expert}.linear_fc"
            yield f"{held}1.weight", torch.cat([first, second])
            yield f"{held}2.weight", down
    yield "decoder.final_layernorm.weight", read("model.norm.weight")
    yield "output_layer.weight", read("lm_head.weight")


def same(found, expected):
    assert (found.facts.step, found.facts.states, found.facts.dtype) == (ITERATION, STATES, "float32")
    assert found.architecture.family == expected.architecture.family
    same_values(found, expected)
    assert set(found.self_check()) == {spec.name for spec in expected.architecture.stored}


@runs_with_this_torch
def test_two_ranks_parts_are_read(tmp_path: Path):
    run_processes(saved_by_fsdp, 2, [Case(tmp_path, partial(llama_rank, LLAMA, 1))])
    source, found = drawn(LLAMA), open_source(tmp_path)
    assert found.facts.kind == "Megatron-core fsdp_dtensor"
    assert [group["weight_decay"] for group in found.facts.optimizer_groups] == [0.1]
    same(found, source)
    rows = found.read("model.layers.2.mlp.up_proj.weight", "exp_avg", ((5, 19), (3, 11)))
    assert torch.equal(rows, source.read("model.layers.2.mlp.up_proj.weight", "exp_avg")[5:19, 3:11])


TIED = {"untie_embeddings_and_output_weights": False}
CASES = {
    "llama over four": (LLAMA, llama_rank, (1, 1), {}),
    "llama, tied": ({**LLAMA, "tie_word_embeddings": True}, llama_rank, (2, 1), TIED),
    "gpt2": (GPT2_CONFIG, gpt2_rank, (2, 1), GPT2),
    "mixtral": (MIXTRAL_CONFIG, mixtral_rank, (1, 2), MIXTRAL),
}


@pytest.mark.skipif(RELEASE < Version("0.16"), reason="its Megatron-FSDP does not take ranks of experts")
@pytest.mark.slow
def test_parts_of_fsdp_tensor_and_expert_ranks_are_read(tmp_path: Path):
    """Parts of unlike sizes, on meshes of one and of two dimensions; the step is among the states, where torch has it."""
    cases = [
        Case(tmp_path / name, partial(rank, config, max(degrees)), degrees, False, further)
        for name, (config, rank, degrees, further) in CASES.items()
    ]
    ranks = run_processes(saved_by_fsdp, 4, cases, timeout=900)
    sizes = [rank[0]["decoder.layers.0.mlp.linear_fc1.weight"] for rank in ranks]
    assert sum(sizes) == 48 * 16 and len(set(sizes)) > 1, sizes
    for name, (config, *_) in CASES.items():
        same(open_source(tmp_path / name), drawn(config))


@pytest.mark.slow
def test_the_weights_under_torch_fsdp_are_read(tmp_path: Path):
    """Its optimizer numbers the parameters. The rows of most parameters are no multiple of three."""
    run_processes(saved_by_torch_fsdp, 3, tmp_path, partial(llama_rank, LLAMA, 1), timeout=900)
    source, found = drawn(LLAMA), open_source(tmp_path)
    assert (found.facts.kind, found.facts.states) == ("Megatron-core torch_dcp", ("weight",))
    assert "torch_dcp numbers the parameters in the optimizer's state" in found.facts.no_moments
    for spec in source.architecture.stored:
        assert torch.equal(found.read(spec.name), source.read(spec.name)), spec.name
