"""Checkpoints of DeepSpeed's AutoTP are read whole: uneven vocabularies and heads, replicated biases, scaled pieces."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import torch
from autotp_engines import case_model, write_autotp

from incr_ds.checkpoint.deepspeed.autotp import AffineMaps
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import CheckpointError, GrowthError
from incr_ds.growth.rules import MOMENT_RULES, refuse
from incr_ds.testing.processes import run_processes

BIASES = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}
CASES = {
    "z1-tied": {"family": "llama", "stage": 1, "config": {"tie_word_embeddings": True, **BIASES}},
    "z0": {"family": "llama", "stage": 0, "config": {"tie_word_embeddings": False, "num_key_value_heads": 2}},
    "z2-bf16": {"family": "qwen2", "stage": 2, "bf16": True, "config": {"num_key_value_heads": 2}},
    "z3-uneven-heads": {"family": "llama", "stage": 3, "config": {"num_attention_heads": 3, "num_key_value_heads": 3}},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("autotp")
    run_processes(write_autotp, 2, str(folder), CASES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_is_read(written, case):
    checkpoint = open_source(written / case)
    assert checkpoint.facts.layout["tensor_parallel"] == 2 and checkpoint.facts.layout["data_parallel"] == 1
    expected = dict(case_model(CASES[case]).named_parameters())
    assert set(expected) == {spec.name for spec in checkpoint.architecture.stored}
    for name, weight in expected.items():
        rounded = weight.data.bfloat16().float() if CASES[case].get("bf16") else weight.data
        assert torch.equal(checkpoint.read(name), rounded), name
        assert torch.equal(checkpoint.read(name, "exp_avg"), 2 * rounded), name
        assert torch.equal(checkpoint.read(name, "exp_avg_sq"), rounded**2), name
        middle = slice(len(weight) // 3, len(weight) // 2 + 2)
        assert torch.equal(checkpoint.read(name, "exp_avg", ((middle.start, middle.stop),)), 2 * rounded[middle]), name
    list(checkpoint.self_check())


def test_deepspeed_left_its_maps(written):
    """Without these maps the test above would not cover them."""
    content = torch.load(written / "z1-tied" / "step" / "mp_rank_01_model_states.pt", weights_only=False)
    maps = content["universal_checkpoint_info"]["affine_map"]["params"]
    assert {r"^model\.layers\.0\.mlp\.down_proj\.bias$", r"^model\.embed_tokens\.weight$"} <= set(maps)


def test_replicated_copies_must_be_equal(written, tmp_path: Path):
    """A norm is on both tensor ranks, each with its own optimizer file."""
    shutil.copytree(written / "z1-tied", tmp_path / "copy")
    path = tmp_path / "copy" / "step" / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    content = torch.load(path, weights_only=False)
    content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["exp_avg_sq"][-1] += 1  # the final norm's
    torch.save(content, path)
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight: exp_avg_sq of .* on model-parallel rank 0 .* rank 1 differ"
    ):
        list(open_source(tmp_path / "copy").self_check())


def test_zero_0_with_a_rank_whose_moments_match_no_names_gives_weights_and_says_which(written, tmp_path: Path):
    """Each rank's optimizer numbers its own parameters. The other rank's moments alone are not enough."""
    shutil.copytree(written / "z0", tmp_path / "copy")
    path = tmp_path / "copy" / "step" / "mp_rank_01_model_states.pt"
    content = torch.load(path, weights_only=False)
    content["optimizer"]["param_groups"][0]["params"].reverse()
    torch.save(content, path)
    checkpoint = open_source(tmp_path / "copy")
    reason = (
        r"mp_rank_01_model_states.pt: ZeRO-0's optimizer numbers \d+ parameters in 1 group\(s\) without names, and none of "
        r"the module's orders matches \(save with ZeRO-1\); weights are the module's, in torch.float32"
    )
    assert checkpoint.facts.states == ("weight",) and re.fullmatch(reason, checkpoint.facts.no_moments)
    for name, weight in case_model(CASES["z0"]).named_parameters():
        assert torch.equal(checkpoint.read(name), weight.data), name
    assert list(checkpoint.self_check())
    with pytest.raises(GrowthError, match=reason + r"\), but optimizer: rescale needs them; set optimizer: reset"):
        refuse(MOMENT_RULES, "copy", checkpoint.facts, GrowthRecipe(target={}))


def replicated(scale):
    piece = {"shape": [5], "source": [0, [1]], "dest": [0, [1]], "locations": [0, 1], "scale": scale}
    return {"logical_shape": [5], "ranks": {rank: {"shard_shape": [5], "pieces": [piece]} for rank in (0, 1)}}


def info(entry, version=1):
    return {"affine_map": {"version": version, "params": {r"^a\.bias$": entry}}}


def test_a_scaled_bias_is_unscaled_and_its_moments_too():
    """Pieces pre-divided by the degree, as the format allows: weight by s, exp_avg by 1/s, exp_avg_sq by 1/s^2."""
    from incr_ds.checkpoint.assembly import HeldBlock, assemble
    from incr_ds.checkpoint.deepspeed.partition import FlatParameter, FlatShards, Piece

    stored = {"weight": torch.arange(5.0) / 2, "exp_avg": torch.arange(5.0) * 2, "exp_avg_sq": torch.arange(5.0) * 4}
    shards = FlatShards(
        {"a.bias": FlatParameter((5,), (Piece(0, 0, 0, 5),))}, {state: [[flat]] for state, flat in stored.items()}
    )
    blocks = AffineMaps(info(replicated(0.5)), "test").blocks("a.bias", "a.bias", 1)
    rank = type("Rank", (), {"shards": shards})()
    tensor = assemble((5,), [HeldBlock(rank, "a.bias", block) for block in blocks], "test")
    for state in stored:
        assert torch.equal(tensor.read(state, 1, 4), torch.arange(1.0, 4.0)), state


def test_maps_that_are_not_understood():
    with pytest.raises(CheckpointError, match=r"test: its affine map has version 2, but only version 1 is known"):
        AffineMaps(info(replicated(1.0), 2), "test")
    strided = copy.deepcopy(replicated(1.0))
    strided["ranks"][0]["pieces"][0] |= {"shape": [2], "source": [0, [2]]}
    with pytest.raises(CheckpointError, match=r"a\.bias: AutoTP cut it into pieces that are not rectangles"):
        AffineMaps(info(strided), "test").blocks("a.bias", "a.bias", 0)
    refused = info(replicated(1.0)) | {"autotp_unsupported_parameter_patterns": {r"^a\.bias$": "shared q and k"}}
    with pytest.raises(CheckpointError, match=r"a\.bias: AutoTP states that it cannot be assembled: shared q and k"):
        AffineMaps(refused, "test").blocks("a.bias", "a.bias", 0)
    assert AffineMaps(None, "test").blocks("a.bias", "a.bias", 0) is None
