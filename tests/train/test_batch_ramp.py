"""batch.ramp: the global batch changes at steps of the schedule, and every sample is counted."""

import json

import pytest
import torch
from one_number import LENGTH, curve, make_world, names, settings, stop_at, stoppable
from ramp_runs import STEPS, train_ramp_and_parts
from token_data import write_random_documents

from incr_ds.checkpoint.opening import open_source
from incr_ds.config.batch import BatchSettings
from incr_ds.config.fields import parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.data.samples import batches
from incr_ds.errors import ConfigError
from incr_ds.launch.deepspeed_config import deepspeed_config
from incr_ds.launch.dry_run import dry_run
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.train.cached_teacher import cached_samples
from incr_ds.train.metrics import read_metrics
from incr_ds.train.pretraining import begin, pretrain

SIZES = {"sequence_length": LENGTH, "micro_batch_size": 2, "global_batch_size": 4}
RAMP = [{"at_step": 2, "global_batch_size": 8}, {"at_step": 5, "global_batch_size": 12}]


def test_sizes_and_sums():
    batch = BatchSettings.model_validate({**SIZES, "ramp": RAMP})
    sizes = [4, 4, 8, 8, 8, 12, 12, 12]
    assert [batch.size_at(step) for step in range(8)] == sizes
    for first in range(8):
        for stop in range(first, 9):
            assert batch.samples_between(first, stop) == sum(sizes[first:stop])
            assert batch.steps_back(stop, sum(sizes[first:stop])) == stop - first
    assert batch.spans(1, 7) == [(1, 4), (3, 8), (2, 12)] and batch.spans(3, 5) == [(2, 8)]


def test_ranks_share_the_batch_of_each_step():
    batch = BatchSettings.model_validate({**SIZES, "ramp": RAMP})

    class Numbers:
        def tokens(self, number):
            return torch.full((LENGTH + 1,), number).numpy()

    def read(rank, ranks, first, step, steps):
        feed = batches(Numbers(), first, batch, rank, ranks, step=step)
        return [
            [int(number) for _ in range(batch.size_at(step + taken) // 2 // ranks) for number in next(feed)[0][:, 0]]
            for taken in range(steps)
        ]

    whole = read(0, 1, 100, 0, 6)
    assert [number for step in whole for number in step] == list(range(100, 100 + 4 + 4 + 8 * 3 + 12))
    split = zip(read(0, 2, 100, 0, 6), read(1, 2, 100, 0, 6), strict=True)
    assert [[*one, *other] for one, other in split] == whole
    assert read(0, 1, 100 + 16, 3, 3) == whole[3:]  # resumed


@pytest.fixture
def world(tmp_path, monkeypatch):
    return make_world(tmp_path, monkeypatch)


def ramped(world, output, **changes):
    schedule = {"train_steps": 8, "learning_rate": 0.1, "warmup_steps": 2}
    return settings(world, output, **({"batch": {**SIZES, "ramp": RAMP}, "schedule": schedule} | changes))


def test_every_sample_counts_once_and_a_stop_within_the_ramp_changes_nothing(world):
    calm = ramped(world, "calm")
    pretrain(calm)
    rows = [item for item in curve(calm) if item["kind"] == "train"]
    samples = [4, 8, 16, 24, 32, 44, 56, 68]
    assert [item["consumed_samples"] for item in rows] == samples
    assert [item["tokens"] for item in rows] == [count * LENGTH for count in samples]
    assert [item["flops"] / item["tokens"] for item in rows] == pytest.approx(
        [rows[0]["flops"] / rows[0]["tokens"]] * 8
    )
    for when in (1, 3, 6):
        stopped = ramped(world, f"stopped{when}")
        world["on_step"] = stop_at(when)
        stoppable(stopped)
        assert names(stopped)[-1] == f"step_{when:08d}"
        world["on_step"] = lambda step, number: number
        pretrain(stopped)
        assert curve(stopped) == curve(calm)


def test_resuming_with_another_ramp_is_refused(world):
    pretrain(ramped(world, "x", schedule={"train_steps": 8, "end_step": 3, "learning_rate": 0.1}))
    with pytest.raises(
        ConfigError, match=r"same order of tokens:\n  batch.ramp: .*'at_step': 2.* there, \[\] in this run"
    ):
        pretrain(ramped(world, "x", batch=SIZES))


def test_a_run_that_is_a_part_of_the_schedule_begins_behind_the_samples_before_it(world):
    part = ramped(world, "x", schedule={"train_steps": 8, "start_step": 4, "learning_rate": 0.1})
    assert (begin(part).consumed_samples, begin(part).tokens) == (24, 24 * LENGTH)
    taught = {"teacher": "unused", "weight": 0.5, "final_weight": 0.0, "anneal_steps": 4}
    assert cached_samples(ramped(world, "x", distillation=taught), 1, 4) == range(4, 24)


def test_a_dry_run_sums_the_steps(world):
    run = ramped(world, "x")
    part = dry_run(run).parts[0]
    assert part.tokens == 68 * LENGTH and part.spans == [(2, 4), (3, 8), (3, 12)]
    constant = dry_run(ramped(world, "x", batch=SIZES)).parts[0]
    assert part.flops / constant.flops == pytest.approx(68 / 32)
    assert [use.epochs for use in dry_run(run).data] == [
        pytest.approx(use.epochs * 68 / 32) for use in dry_run(ramped(world, "x", batch=SIZES)).data
    ]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            {"ramp": [{"at_step": 2, "global_batch_size": 7}]},
            r"size 7 \(of batch.ramp\) is not a multiple .*nearest: 6 or 8",
        ),
        ({"ramp": [*RAMP, RAMP[0]]}, "ramp.2.at_step 2 is not after 5"),
        ({"ramp": [{"at_step": 8, "global_batch_size": 8}]}, "batch.ramp.0.at_step 8: no step would have this size"),
        ({"ramp": [{"at_step": 0, "global_batch_size": 8}]}, "batch.ramp.0.at_step"),
    ],
)
def test_what_cannot_be_is_refused(world, batch, message):
    with pytest.raises(ConfigError, match=message):
        ramped(world, "x", batch={**SIZES, **batch})


def test_steps_may_be_shares(world):
    run = ramped(world, "x", batch={**SIZES, "ramp": [{"at_step": "30%", "global_batch_size": 8}]})
    assert run.batch.ramp[0].at_step == 3


def test_an_offloaded_optimizer_cannot_change_to_several_micro_batches(world):
    file = world["folder"] / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}))
    content = ramped(world, "x").model_dump() | {"deepspeed": str(file)}
    content["batch"]["micro_batch_size"] = 4
    with pytest.raises(ConfigError, match=r"offload_optimizer\): does not go with batch.ramp from one micro-batch"):
        deepspeed_config(parse_settings(content, RunSettings, "test"))
    content["batch"]["micro_batch_size"] = 2
    config = deepspeed_config(parse_settings(content, RunSettings, "test"))
    assert (config["train_batch_size"], config["gradient_accumulation_steps"]) == (4, 2)
    content["schedule"]["start_step"] = 6
    assert deepspeed_config(parse_settings(content, RunSettings, "test"))["train_batch_size"] == 12


@pytest.fixture(
    scope="module",
    params=[{"data_parallel": 2, "zero_stage": 2}, {"data_parallel": 2, "zero_stage": 3}, {"pipeline_parallel": 2}],
    ids=["zero2", "zero3", "pipeline"],
)
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ramp")
    write_random_documents(folder, documents=30, length=50)
    architecture = small_architecture("llama", num_hidden_layers=2, num_key_value_heads=2)
    (folder / "config.json").write_text(json.dumps(dict(architecture.config)))
    run_processes(train_ramp_and_parts, 2, str(folder), request.param)
    return folder


@pytest.mark.slow
def test_a_ramp_trains_as_runs_of_one_size_do_bit_for_bit(runs):
    ends = [(1, "part0"), (2, "part1"), (3, "part1"), (4, "part2")]
    pairs = [(step, "ramp", other) for step, other in ends] + [(STEPS, "ramp", "stopped")]
    for step, *outputs in pairs:
        one, other = (open_source(runs / output / f"checkpoints/step_{step:08d}") for output in outputs)
        assert one.facts.step == other.facts.step == step
        for spec in one.architecture.stored:
            for state in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.equal(one.read(spec.name, state), other.read(spec.name, state)), (step, spec.name, state)


@pytest.mark.slow
def test_its_metrics_are_those_of_the_parts(runs):
    def losses(output):
        rows = [item for item in read_metrics(runs / output / "metrics.jsonl") if item["kind"] == "train"]
        return [(item["step"], item["loss"], item["gradient_norm"]) for item in rows]

    assert losses("ramp") == losses("part0") + losses("part1") + losses("part2") == losses("stopped")
