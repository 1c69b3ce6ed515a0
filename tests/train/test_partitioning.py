"""Under ZeRO-3 a rank holds its share of the model from the first layer on, and trains as if the model had been cut whole."""

import pytest
import torch
from partition_runs import build_both_ways, measure_both_ways

from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.processes import run_processes

CASES = {
    "fresh": {"tied": False, "precision": "fp32", "loaded": False, "freeze": []},
    "loaded": {"tied": True, "precision": "bf16", "loaded": True, "freeze": ["model.layers.0.*", "*norm*"]},
}


@pytest.mark.parametrize("name", ["fresh", pytest.param("loaded", marks=pytest.mark.slow)])
def test_training_is_the_same_bit_for_bit(name):
    for rank in run_processes(build_both_ways, 2, CASES[name], {}, 3):
        early, late = rank["early"], rank["late"]
        assert early["losses"] == late["losses"] and len(early["losses"]) == 3
        assert early["values"].keys() == late["values"].keys() and early["values"]
        assert all(torch.equal(value, late["values"][key]) for key, value in early["values"].items())


@pytest.mark.slow
def test_a_rank_never_holds_the_whole_model():
    """200 MB of weights on two ranks, in twelve layers of 17 MB."""
    sizes = {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8, "head_dim": 64,
        "num_key_value_heads": 8, "vocab_size": 2000,
    }  # fmt: skip
    architecture = pico_architecture("llama", tied=True, **sizes)
    whole = 4 * architecture.num_parameters
    layer = 4 * sum(spec.numel for spec in architecture.stored if spec.layer == 0)
    assert 200e6 < whole < 210e6 and 16e6 < layer < 18e6
    for rank in run_processes(measure_both_ways, 2, {**CASES["fresh"], "tied": True}, sizes):
        assert rank["late"]["building"] > whole
        assert rank["early"]["building"] < whole / 2 + layer
