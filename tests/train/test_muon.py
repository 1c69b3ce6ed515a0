"""Muon for the matrices of decoder layers: the published iteration in every layout, exact resuming, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from engine_cases import Case, assert_pieces
from muon_runs import reference, train, train_runs
from offloaded_runs import spoil_a_step
from token_data import write_random_documents

from incr_ds.checkpoint.base import MUON_STATES
from incr_ds.checkpoint.integrity import check_folder
from incr_ds.checkpoint.opening import open_source
from incr_ds.errors import ConfigError
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint
from incr_ds.sharding.optimizer_groups import set_apart
from incr_ds.sharding.partition_sizes import whole_sizes
from incr_ds.testing.checkpoint import drawn_checkpoint
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.pico import pico_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.testing.runs import pico_run
from incr_ds.train.metrics import TIMINGS, read_metrics
from incr_ds.train.start import _check_same_optimizer

PLAIN = {"name": "muon", "gradient_clipping": 0.0}


@pytest.mark.parametrize(
    "case",
    [
        Case("llama", tied=True, data=2, zero=1, accumulation=2),
        Case("qwen3", tied=False, data=2, zero=2, accumulation=2),
        Case("llama", tied=True, pipeline=2, accumulation=2),
        pytest.param(Case("qwen2", tied=False, pipeline=2, data=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_training_equals_one_process(case):
    """The iteration rounds to bf16, so that a last bit of a gradient may change an update (a step is about 6e-3) by 1%."""
    expected, weights = reference(case)
    ranks = run_processes(train, case.world, case)
    assert ranks[0][0] == pytest.approx(expected, rel=1e-4)
    assert_pieces(weights, [values for _, values in ranks], tolerance=1e-3)


def test_gradients_that_are_not_finite_leave_the_momentum_as_it_was():
    ((first, spoiled, last),) = run_processes(spoil_a_step, 1, 1, PLAIN)
    assert [part[0].skipped for part in (first, spoiled, last)] == [False, True, False]
    assert [part[1] for part in (first, spoiled, last)] == [False, True, False]
    assert math.isfinite(last[0].loss) and math.isfinite(last[0].gradient_norm)


def test_matrices_of_decoder_layers_are_muons():
    architecture = pico_architecture("llama", tied=False, num_hidden_layers=1)
    assert set_apart("adamw", architecture) == frozenset()
    names = {name.removeprefix("model.layers.0.") for name in set_apart("muon", architecture)}
    assert names == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"), *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }  # fmt: skip


def test_momentum_is_kept_of_whole_tensors():
    """Two ranks of 13 elements, of tensors of 12, 9 and 4 in this order: the second of them is on both."""
    assert whole_sizes([(2, 2), (3, 3), (4, 3)], 2) == [21, 13]
    assert whole_sizes([(2, 2), (3, 3), (4, 3)], 1) == [25]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"name": "muon"}}, "gradient_clipping 1 does not go with name: muon: .* set gradient_clipping: 0"),
        ({"optimizer": {**PLAIN, "offload": "cpu"}}, "offload: cpu does not go with name: muon"),
        ({"optimizer": PLAIN, "precision": "fp16"}, "optimizer.name: muon does not go with precision: fp16"),
        ({"optimizer": {"muon": {}}}, "muon: its settings belong to name: muon, not to name: adamw"),
        ({"optimizer": PLAIN, "layout": {"tensor_parallel": 2}}, "optimizer.name: muon with layout.tensor_parallel 2: Muon"),
        ({"optimizer": PLAIN, "layout": {"zero_stage": 3}}, "optimizer.name: muon goes with layout.zero_stage 1 and 2"),
    ],
)  # fmt: skip
def test_what_muon_cannot_do_is_refused_in_the_run_file(sections, message):
    with pytest.raises(ConfigError, match=message):
        pico_run(**sections)


@pytest.fixture(scope="module", params=[{"data_parallel": 2, "zero_stage": 2}, {"pipeline_parallel": 2}], ids=str)
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("muon")
    write_random_documents(folder, documents=30, length=50)
    architecture = small_architecture("llama", num_hidden_layers=2, num_key_value_heads=2)
    (folder / "config.json").write_text(json.dumps(dict(architecture.config)))
    for optimizer in ("reset", "rescale"):
        recipe = {"target": {"num_hidden_layers": 4, "hidden_size": 144}, "optimizer": optimizer}
        (folder / f"{optimizer}.yaml").write_text(yaml.safe_dump(recipe))
    refused = run_processes(train_runs, 2, str(folder), request.param)[0]
    return folder, refused


def rows(folder, output):
    found = read_metrics(folder / output / "metrics.jsonl")
    return [{key: value for key, value in item.items() if key not in TIMINGS} for item in found]


def states(folder, output):
    """Everything in the optimizer files of the last checkpoint, by file, group and name."""
    found = {}
    tag = folder / output / "checkpoints" / "step_00000006" / "global_step6"
    for path in sorted(tag.glob("*optim_states.pt")):
        content = torch.load(path, weights_only=False)["optimizer_state_dict"]
        for index, master in enumerate(content["single_partition_of_fp32_groups"]):
            found[path.name, index, "weight"] = master
        for index, state in content["base_optimizer_state"]["state"].items():
            found |= {(path.name, index, name): torch.as_tensor(value) for name, value in state.items()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "parts"), [("whole", "parts"), ("grown", "grown parts")])
def test_a_run_resumes_bit_for_bit(runs, whole, parts):
    folder, _ = runs
    assert rows(folder, parts) == rows(folder, whole)
    first, second = states(folder, whole), states(folder, parts)
    assert first.keys() == second.keys() and {name for _, _, name in first} == {
        "weight", "exp_avg", "exp_avg_sq", "step", "momentum_buffer",
    }  # fmt: skip
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(value.any() for key, value in first.items())


def losses(folder, output):
    return [item["loss"] for item in rows(folder, output) if item["kind"] == "train"]


@pytest.mark.slow
def test_a_run_starts_from_the_momentum_of_another(runs):
    """In its own precision DeepSpeed loads the files; in another one, masters and momentum are read by tensor."""
    folder, _ = runs
    expected = losses(folder, "whole")[3:]
    assert losses(folder, "after") == expected
    assert losses(folder, "in bf16") == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
def test_what_would_lose_the_momentum_is_refused(runs):
    folder, refused = runs
    assert "optimizer.name: adamw, but" in refused["adamw"] and "has the optimizer state of muon" in refused["adamw"]
    assert "optimizer.name: muon there, adamw in this run file" in refused["resumed by adamw"]
    assert "optimizer.name: muon, but" in refused["rescale"] and "the optimizer state of adamw" in refused["rescale"]


@pytest.mark.slow
def test_a_checkpoint_of_muon_is_read_by_tensor_and_grown(runs):
    folder, _ = runs
    source, grown = folder / "whole" / "checkpoints" / "step_00000006", folder / "offline"
    found = open_source(source)
    assert found.facts.states == MUON_STATES and found.facts.step == 6
    assert found.facts.momentum == set_apart("muon", found.architecture)
    assert list(found.self_check())
    if not grown.exists():
        grow_checkpoint(plan_request(GrowthRequest(source, folder / "rescale.yaml", grown)))
    larger = open_source(grown)
    assert list(larger.self_check()) and check_folder(grown)
    name = "model.layers.0.mlp.down_proj.weight"  # [96 to 144, 250]: 48 outputs have two copies
    old, new = (checkpoint.read(name, "momentum_buffer") for checkpoint in (found, larger))
    assert old.any() and torch.allclose(new[48:96], old[48:] / 1.5**0.5) and torch.equal(new[96:], new[:48])


def test_a_state_in_which_muon_trained_other_tensors_is_refused():
    source = drawn_checkpoint(pico_architecture())
    matrix = "model.layers.1.mlp.up_proj.weight"
    source.facts = replace(source.facts, states=MUON_STATES, momentum=frozenset({matrix}))
    run = pico_run(optimizer=PLAIN)
    with pytest.raises(
        ConfigError, match=r"optimizer\.name: muon trains the matrices .* it trained other tensors, unlike model"
    ):
        _check_same_optimizer(run, source, "model.load_optimizer: false")
