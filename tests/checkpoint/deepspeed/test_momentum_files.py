"""Muon's momentum in DeepSpeed's files: written, read by tensor, checked, compared and shown, in several layouts."""

import json
import shutil

import pytest
import torch
from commands import run_tool
from muon_source import TrainedByMuon

from incr_ds.checkpoint.base import MUON_STATES
from incr_ds.checkpoint.integrity import check_folder
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.errors import CheckpointError, GrowthError
from incr_ds.offline.plan import GrowthRequest, plan_files
from incr_ds.offline.run import grow_checkpoint
from incr_ds.testing.memory import small_architecture

LAYOUTS = [
    {},
    {"data_parallel": 2, "zero_stage": 2},
    {"data_parallel": 7},
    {"pipeline_parallel": 3, "data_parallel": 2},
    {"data_parallel": 2, "dtype": "bfloat16"},
]
MATRIX, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


def written(folder, layout, **content):
    """The folder that holds the source, or what ``content`` makes of it."""
    source = TrainedByMuon(small_architecture("llama", tie_word_embeddings=True))
    folder.mkdir()
    (folder / "recipe.yaml").write_text("target: {}\n")
    recipe = parse_settings({"target": {}, "layout": layout, **content}, GrowthRecipe, "test")
    grow_checkpoint(plan_files(GrowthRequest(folder, folder / "recipe.yaml", folder / "files"), source, recipe))
    return source, folder / "files"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_state_of_every_tensor_is_read(tmp_path, layout):
    source, folder = written(tmp_path / "one", layout)
    found = open_source(folder)
    assert found.facts.momentum == source.facts.momentum and found.facts.states == MUON_STATES
    assert found.facts.step == 100
    for spec in source.architecture.stored:
        for state in source.facts.states_of(spec.name):
            assert torch.equal(found.read(spec.name, state), source.read(spec.name, state)), (spec.name, state)
    part = ((17, 40), (3, 60))
    assert torch.equal(found.read(MATRIX, "momentum_buffer", part), source.read(MATRIX, "momentum_buffer", part))
    assert list(found.self_check()) and check_folder(folder)


def test_a_state_that_a_tensor_does_not_have(tmp_path):
    found = open_source(written(tmp_path / "one", {})[1])
    with pytest.raises(CheckpointError, match=f"{MATRIX} has no exp_avg: Muon trains it"):
        found.read(MATRIX, "exp_avg")
    with pytest.raises(CheckpointError, match=f"{NORM} has no momentum_buffer: Adam trains it"):
        found.read(NORM, "momentum_buffer")


def optimizer_file(folder, rank):
    return folder / "grown" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def change_momentum(folder, rank, change):
    """Change the state of Muon's group in a rank's file."""
    path = optimizer_file(folder, rank)
    content = torch.load(path, weights_only=True)
    states = content["optimizer_state_dict"]["base_optimizer_state"]["state"]
    change(next(state for state in states.values() if "momentum_buffer" in state))
    torch.save(content, path)


def add_one(state):
    state["momentum_buffer"][0] += 1.0  # of the matrix that this rank shares with the one before it


def lose_one(state):
    state["momentum_buffer"] = state["momentum_buffer"][:-1].clone()


def add_a_number(state):
    state["momentum_buffer"] = torch.cat([state["momentum_buffer"], torch.ones(1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (add_one, "zero_pp_rank_1_.*: its momentum_buffer is not the one in zero_pp_rank_0_.*each of the two holds the whole"),
        (lose_one, "data-parallel rank 1, group 1, momentum_buffer: expected at least .* elements for model.layers"),
        (add_a_number, "momentum_buffer of model-parallel rank 0: ZeRO's padding is not zero"),
    ],
    ids=["disagreeing", "short", "long"],
)  # fmt: skip
def test_momentum_of_another_checkpoint_is_found(tmp_path, change, message):
    _, folder = written(tmp_path / "one", {"data_parallel": 2})
    (folder / "manifest.json").unlink()
    change_momentum(folder, 1, change)
    with pytest.raises(CheckpointError, match=message):
        list(open_source(folder).self_check())


def test_muon_before_its_first_step_has_no_moments(tmp_path):
    _, folder = written(tmp_path / "one", {})
    change_momentum(folder, 0, dict.clear)
    facts = open_source(folder).facts
    assert facts.states == ("weight",) and not facts.momentum
    assert "group 1 is trained by Muon, and needs its momentum_buffer alone (found nothing: saved" in facts.no_moments


def test_commands_show_the_momentum(tmp_path):
    _, folder = written(tmp_path / "one", {"data_parallel": 2})
    shown = json.loads(run_tool("inspect_checkpoint", folder, "--json").stdout)
    assert shown["states"][-1] == "momentum_buffer" and len(shown["momentum"]) == 21 and MATRIX in shown["momentum"]
    text = " ".join(run_tool("inspect_checkpoint", folder).stdout.split())
    assert "trained by Muon 21 tensors, with momentum_buffer alone" in text
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    for rank in (0, 1):
        change_momentum(other, rank, lambda state: state["momentum_buffer"].neg_())
    found = json.loads(run_tool("inspect_checkpoint", "diff", folder, other, "--json").stdout)
    assert {(item["name"], item["state"]) for item in found["differences"]} == {
        (name, "momentum_buffer") for name in shown["momentum"]
    }
    assert json.loads(run_tool("verify_checkpoint", folder, "--json").stdout)["tensors"] >= 29
    flip_a_byte(folder, MATRIX)
    refused = run_tool("verify_checkpoint", folder)
    assert refused.returncode == 2 and MATRIX in refused.stderr and "momentum_buffer" in refused.stderr


def flip_a_byte(folder, tensor):
    """Change one byte of a tensor's momentum, at the place that the manifest states."""
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    places = (
        (name, part["offset"])
        for name, entry in listed.items()
        for part in entry.get("tensors", ())
        if (part["tensor"], part["state"]) == (tensor, "momentum_buffer")
    )
    name, offset = next(places)
    content = bytearray((folder / name).read_bytes())
    content[offset] ^= 1
    (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"format": "universal"}, "layout.format: universal"),
        ({"format": "torch_dist"}, "layout.format: torch_dist"),
        ({"zero_stage": 3}, "layout.zero_stage: 3"),
        ({"tensor_parallel": 3}, "layout.tensor_parallel: 3"),
        ({"modules": "megatron-deepspeed"}, "layout.modules: megatron-deepspeed"),
    ],
)
def test_momentum_that_a_layout_has_no_place_for_is_refused(tmp_path, layout, named):
    message = f"{named}: the source's momentum_buffer, of 21 tensors that Muon trains, .* set optimizer: reset"
    with pytest.raises(GrowthError, match=message):
        written(tmp_path / "one", layout)
    _, folder = written(tmp_path / "two", layout, optimizer="reset")
    assert not open_source(folder).facts.momentum
