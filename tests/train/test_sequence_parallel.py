"""Ranks that share samples train as one process does: losses, evaluations, gradients and weights."""

import re
import shutil

import pytest
import torch
from cached_runs import settings, train_all, write_material
from engine_cases import OPTIMIZER, Case, reference, train

from incr_ds.arch.training import check_shared_samples
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import merged
from incr_ds.data.slices import slices
from incr_ds.errors import ConfigError, LayoutError
from incr_ds.launch.activations import shape_of
from incr_ds.launch.deepspeed_config import deepspeed_config
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.train.metrics import read_metrics

# Two key-value heads over two ranks; a window of 5 in slices of 6 tokens, under ZeRO-3, which gathers weights between the
# exchanges; two groups of ranks, with slices of unlike numbers of valid labels in all of them.
CASES = [
    Case("llama", tied=False, data=2, sequence=2, accumulation=4),
    Case("mistral", tied=False, data=2, sequence=2, zero=3, accumulation=1, recompute=True),
    pytest.param(
        Case("qwen3", tied=True, data=4, sequence=2, zero=2, accumulation=2, divergence="reverse_kl", z_loss=0.01),
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_one_process(case):
    expected_steps, expected_evaluations, expected_weights = reference(case)
    ranks = run_processes(train, case.world, case, timeout=600)
    steps, evaluations, _ = ranks[0]
    assert all(rank[:2] == (steps, evaluations) for rank in ranks), "every rank reports the same numbers"
    found = [(step.loss, step.ce, step.divergence, step.gradient_norm) for step in steps]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected_steps), rtol=1e-5, atol=1e-6)
    assert found[0][3] > OPTIMIZER["gradient_clipping"]
    torch.testing.assert_close(torch.tensor(evaluations), torch.tensor(expected_evaluations), rtol=1e-5, atol=0)
    for *_, values in ranks:
        for (name, _), value in values.items():
            torch.testing.assert_close(
                value, expected_weights[name], rtol=1e-5, atol=1e-5, msg=lambda text, n=name: n + text
            )


LAYOUT = {"data_parallel": 2, "zero_stage": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """A run whose two ranks read different samples, one whose ranks share them, and this one resumed in both ways."""
    folder = tmp_path_factory.mktemp("shared")
    write_material(folder)
    held_out = {
        "data": {"validation": str(folder / "x_validation_text_document")},
        "evaluation": {"interval": 3, "samples": 2},
    }
    batch = {"ramp": [{"at_step": 2, "global_batch_size": 6}]}
    apart = {"layout": LAYOUT, "batch": batch, **held_out}
    shared = {"layout": LAYOUT, "batch": {**batch, "sequence_parallel": 2}, **held_out}
    run_processes(train_all, 2, str(folder), {"apart": apart, "shared": shared}, timeout=600)
    middle = "checkpoints/step_00000003"
    for output in ("again", "back"):
        shutil.copytree(folder / "shared" / middle, folder / output / middle)
    run_processes(train_all, 2, str(folder), {"again": shared, "back": apart}, timeout=600)
    return folder


def rows(folder, first=1):
    return [row for row in read_metrics(folder / "metrics.jsonl") if row["step"] >= first]


NUMBERS = ("loss", "ce", "divergence", "gradient_norm", "teacher_kl")
COUNTS = ("kind", "step", "consumed_samples", "tokens", "flops")


def same(found, expected, rel):
    assert [[row[key] for key in COUNTS] for row in found] == [[row[key] for key in COUNTS] for row in expected]
    for key in NUMBERS:
        one, other = ([row.get(key) for row in those] for those in (found, expected))
        assert [value is None for value in one] == [value is None for value in other]
        assert [value for value in one if value is not None] == pytest.approx(
            [value for value in other if value is not None], rel=rel, abs=0
        )


def test_a_run_reads_the_same_samples_and_computes_the_same(trained):
    same(rows(trained / "shared", 0), rows(trained / "apart", 0), 2e-6)
    assert {row["step"] for row in rows(trained / "shared", 0) if row.get("teacher_kl")} == {0, 3}
    recorded = open_source(trained / "shared/checkpoints/step_00000006").facts.recorded
    assert recorded.global_samples == 2 * 4 + 4 * 6


def test_a_resumed_run_goes_on_bit_for_bit_and_may_share_samples_no_longer(trained):
    same(rows(trained / "again", 4), rows(trained / "shared", 4), 0)
    same(rows(trained / "back", 4), rows(trained / "apart", 4), 2e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": {"data_parallel": 3}}, "sequence_parallel 2 does not divide layout.data_parallel 3"),
        ({"batch": {"sequence_length": 15}}, "sequence_parallel 2 does not divide batch.sequence_length 15"),
        ({"layout": {"tensor_parallel": 2}}, "does not go with layout.tensor_parallel above 1"),
        ({"layout": {"pipeline_parallel": 2}}, "does not go with layout.pipeline_parallel above 1"),
        ({"data": {"reset_at_document_end": True}}, "does not go with data.reset_at_document_end: true"),
        ({"model": {"attention": "eager"}}, "does not go with model.attention: eager"),
        (
            {"layout": {"data_parallel": 4}, "batch": {"micro_batch_size": 4}},
            "micro_batch_size 4 x data_parallel 4 / sequence_parallel 2; nearest: 8",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, changes, message):
    shared = merged({"layout": LAYOUT, "batch": {"sequence_parallel": 2}}, changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings(tmp_path, "run", **shared)


def test_deepspeed_and_the_dry_run_see_slices(tmp_path):
    run = settings(tmp_path, "run", layout=LAYOUT, batch={"sequence_parallel": 2})
    config = deepspeed_config(run)
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (2 * 4, 4)
    assert shape_of(run).tokens == 16 // 2


def test_heads_that_do_not_divide_and_learned_positions_are_refused():
    three = small_architecture("llama", num_attention_heads=6, num_key_value_heads=3)
    with pytest.raises(LayoutError, match="sequence_parallel 2: the model has 6 heads and 3 key-value heads"):
        check_shared_samples(three, 2)
    check_shared_samples(three, 3)
    check_shared_samples(three, 6)  # each key-value head on two ranks
    with pytest.raises(LayoutError, match="sequence_parallel 2: gpt2 has learned positions"):
        check_shared_samples(small_architecture("gpt2"), 2)


def test_a_slice_has_its_own_labels_and_entries():
    ids, labels = torch.arange(12).view(2, 6), torch.arange(1, 13).view(2, 6)
    entries = torch.arange(24).view(2, 6, 2)
    ((first, targets),) = slices([(ids, (labels, entries, entries + 0.5))], 1, 3)
    assert first.tolist() == [[2, 3], [8, 9]] and targets[0].tolist() == [[3, 4], [9, 10]]
    assert targets[1].tolist() == [[[4, 5], [6, 7]], [[16, 17], [18, 19]]]
    assert torch.equal(targets[2], targets[1] + 0.5)
