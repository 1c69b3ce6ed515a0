"""The format torch, against the files of megatron-core's own models and optimizers on 2 x 2 CPU ranks."""

from itertools import product
from pathlib import Path

import pytest
import torch
from gpt2_parameters import rank_parameters
from megatron_core_ranks import GPT2, LENGTH, MIXTRAL, VOCABULARY
from megatron_rank_folders import parameters_of
from megatron_rank_training import saved_by_ranks
from transformers import AutoModelForCausalLM

from incr_ds.checkpoint.base import STATES
from incr_ds.checkpoint.huggingface.export import export_huggingface
from incr_ds.checkpoint.opening import open_source
from incr_ds.testing.processes import run_processes

BF16, TIED = {"params_dtype": torch.bfloat16}, {"untie_embeddings_and_output_weights": False}
DISTRIBUTED = {"use_distributed_optimizer": True}
CASES = {
    "qwen3": ((2, 2), {"qk_layernorm": True}),
    "qwen2": ((2, 2), {"add_qkv_bias": True} | BF16 | TIED),
    "gpt2": ((2, 2), GPT2 | BF16),
    "mixtral": ((2, 2), MIXTRAL | BF16),
    "llama": ((2, 1), DISTRIBUTED),
    "llama, tied": ((1, 2), DISTRIBUTED | BF16 | TIED),
}
LOCAL = {"self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight"}
ADDED = ("linear_qkv.bias", "q_layernorm.weight", "k_layernorm.weight")  # which the oracle of Llama does not know
BETAS = {"exp_avg": 0.9, "exp_avg_sq": 0.999}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Each case's folder, and what every rank holds."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = [(folder / name, degrees, further) for name, (degrees, further) in CASES.items()]
    ranks = run_processes(saved_by_ranks, 4, cases, timeout=500)
    return {name: (folder / name, [rank[number] for rank in ranks]) for number, name in enumerate(CASES)}


def of_local_modules(tensors):
    found = {}
    for name, tensor in tensors.items():
        for other, local in LOCAL.items():
            name = name.replace(other, local)
        found[name] = tensor
    return found


def after_two_steps(tensor, state, dtype):
    """A moment whose gradients were sines in ``dtype``."""
    beta, found = BETAS[state], torch.zeros(tensor.numel())
    for step in range(2):
        gradient = torch.sin(torch.arange(tensor.numel()) + float(step)).to(dtype).float()
        found = beta * found + (1 - beta) * (gradient if state == "exp_avg" else gradient.square())
    return found.view_as(tensor)


@pytest.mark.slow
def test_every_rank_s_experts_are_read(saved):
    folder, ranks = saved["mixtral"]
    source = open_source(folder)
    assert (source.architecture.family.model_type, source.facts.step) == ("mixtral", 2)
    assert set(source.self_check()) == {spec.name for spec in source.architecture.stored}
    for ((rank, stage), _, parameters), state in product(ranks, STATES):
        for number, expert in product(range(2), range(4)):
            inside = f"model.layers.{2 * stage + number}.block_sparse_moe.experts.{expert}"
            own = [source.read(f"{inside}.w{n}.weight", state) for n in (1, 2, 3)]
            held = f"decoder.layers.{number}.mlp.experts.local_experts.{expert}.linear_fc"
            first = torch.cat([matrix.chunk(2)[rank] for matrix in (own[0], own[2])])
            assert torch.equal(parameters[f"{held}1.weight"][state], first)
            assert torch.equal(parameters[f"{held}2.weight"][state], own[1].chunk(2, dim=1)[rank])
        router = source.read(f"model.layers.{2 * stage}.mlp.gate.weight", state)
        assert torch.equal(parameters["decoder.layers.0.mlp.router.weight"][state], router)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if name != "mixtral"])
def test_every_rank_s_weights_masters_and_moments_are_read(saved, name):
    folder, ranks = saved[name]
    degrees, further = CASES[name]
    source = open_source(folder)
    assert source.architecture.family.model_type == name.partition(",")[0]
    assert (source.facts.step, source.facts.states) == (2, STATES)
    assert source.facts.layout == {"tensor_parallel": degrees[0], "pipeline_parallel": degrees[1]}
    assert set(source.self_check()) == {spec.name for spec in source.architecture.stored}
    for (rank, stage), _, parameters in ranks:
        for state in STATES:
            if name == "gpt2":
                held, unknown = rank_parameters(source, state, degrees, rank, stage), ()
            else:
                held, unknown = of_local_modules(parameters_of(source, state, degrees, rank, stage)), ADDED
            assert set(held) == {key for key in parameters if not key.endswith(unknown)}
            for key, tensor in held.items():
                own = parameters[key]
                if state in own:
                    assert torch.equal(own[state], tensor), (key, state)
                elif state == "weight":
                    assert torch.equal(own["saved"], tensor.to(own["saved"].dtype)), key
                else:
                    expected = after_two_steps(tensor, state, own["saved"].dtype)
                    torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-7)
                assert further.get("use_distributed_optimizer") or state in own


@pytest.mark.slow
def test_transformers_computes_what_the_ranks_did(saved, tmp_path: Path):
    folder, ranks = saved["llama"]
    export_huggingface(open_source(folder), tmp_path / "exported", torch.float32, tmp_path / "none")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    with torch.no_grad():
        found = model(torch.arange(LENGTH)[None] * 3 % VOCABULARY).logits
    by_rank = {place: logits for place, logits, _ in ranks}
    logits = torch.cat([by_rank[0, 0], by_rank[1, 0]], dim=-1)
    assert logits.std() > 0.02
    torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-5)
