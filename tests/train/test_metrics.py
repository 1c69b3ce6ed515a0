import json
import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from incr_ds.arch.flops import forward_flops_per_token, training_flops_per_token
from incr_ds.errors import CheckpointError
from incr_ds.testing.memory import small_architecture
from incr_ds.train.flops import device_peak
from incr_ds.train.metrics import TIMINGS, EvaluationRow, GrowthRow, MetricsFile, Position, TrainRow, read_metrics, row
from incr_ds.train.monitoring import RunMonitor


def train_row(loss):
    return TrainRow(
        loss=loss, ce=loss, divergence=0.5, alpha=0.25, temperature=1.0, learning_rate=1e-3, gradient_norm=2.0,
        skipped=False, tokens_per_second=100.0, tflops_per_rank=0.25, mfu=0.5, seconds=1.0, data_seconds=0.125,
        save_seconds=2.0, memory_bytes=1 << 20, peak_memory_bytes=1 << 21,
    )  # fmt: skip


def held_out(loss):
    return EvaluationRow(loss=loss, perplexity=2.0, bits_per_byte=None, seconds=1.0)


def write(folder, steps, step=None):
    metrics = MetricsFile(folder, None if step is None else Position(step=step), print)
    for number in steps:
        metrics.append(row(Position(step=number, tokens=8 * number), train_row(float(number))))
    metrics.close()


def test_resuming_drops_the_rows_past_the_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3, 4, 5])
    write(tmp_path, [4, 5, 6], step=3)
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert [item["step"] for item in found] == [1, 2, 3, 4, 5, 6]
    assert found[2] == row(Position(step=3, tokens=24), train_row(3.0))


def test_a_new_start_drops_every_row_and_a_half_written_line_is_not_one(tmp_path):
    write(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"kind": "train", "st')
    assert [item["step"] for item in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    write(tmp_path, [1], step=None)
    assert [item["step"] for item in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"step', "not valid JSON"),
        ("[]", "not a valid row of metrics: expected an object whose kind is train, evaluation, growth"),
        ('{"a": 1}', "not a valid row of metrics"),
        ('{"kind": "train", "step": "two"}', "step: expected int, found 'two'"),
        ('{"kind": "train", "step": 2, "tokens": 1, "flops": 1, "loss": "low"}', "loss: expected float, found 'low'"),
    ],
)
def test_a_line_that_is_not_a_row_is_named(tmp_path, line, message):
    write(tmp_path, [1])
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write(line + "\n")
    with pytest.raises(CheckpointError, match=f"metrics.jsonl, line 2: {message}"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_every_line_is_strict_json_also_where_a_number_is_not_finite(tmp_path):
    metrics = MetricsFile(tmp_path, None, print)
    metrics.append(row(Position(step=1), train_row(math.nan)))
    metrics.append(row(Position(step=2), train_row(math.inf)))
    metrics.close()

    def refuse(constant):
        raise AssertionError(constant)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=refuse)["loss"] for line in lines] == [None, None]
    assert [item["loss"] for item in read_metrics(tmp_path / "metrics.jsonl")] == [None, None]


def test_a_full_disk_is_said_once_and_closing_does_not_hide_it(tmp_path):
    metrics = MetricsFile(tmp_path, None)
    metrics.close()
    metrics._stream = open("/dev/full", "a")
    with pytest.raises(
        CheckpointError, match="metrics.jsonl: No space left on device: a row could not be written. Make room"
    ):
        metrics.append(row(Position(step=1), train_row(1.0)))
    metrics.close()


def test_the_keys_of_a_row_are_public():
    position = ["kind", "step", "consumed_samples", "tokens", "flops", "stage", "skipped_steps"]
    train = ["loss", "ce", "divergence", "alpha", "temperature", "learning_rate", "new_learning_rate", "gradient_norm"]
    own = ["skipped", "loss_scale", "router_loss", "expert_load"]
    assert list(row(Position(), train_row(1.0))) == [*position, *train, *own, *TIMINGS]
    assert TIMINGS == (
        "tokens_per_second", "tflops_per_rank", "mfu", "seconds", "data_seconds", "save_seconds",
        "memory_bytes", "peak_memory_bytes", "slowest_rank", "slowest_ratio",
    )  # fmt: skip
    assert list(row(Position(), held_out(1.0))) == [
        *position,
        "loss",
        "perplexity",
        "bits_per_byte",
        "teacher_kl",
        "seconds",
    ]


def test_the_monitor_keeps_rows_and_shows_plain_lines(tmp_path, capsys):
    with RunMonitor(tmp_path, resumed=None, train_steps=20, tensorboard=True) as monitor:
        monitor.record(Position(step=10, tokens=80), train_row(3.25))
        monitor.record(Position(step=10, tokens=80), held_out(3.5))
    assert [item["kind"] for item in read_metrics(tmp_path / "metrics.jsonl")] == ["train", "evaluation"]
    assert list((tmp_path / "tensorboard").glob("events.*"))
    shown = capsys.readouterr().out
    assert "step 10/20  loss 3.2500 (ce 3.2500, kl 0.5000, a 0.250)  lr 1.00e-03  |g| 2.000" in shown
    assert "step 10/20  held-out loss 3.5000  perplexity 2.00\n" in shown


def test_a_growth_is_a_row_without_a_loss_and_shown_on_the_board(tmp_path, capsys):
    growth = GrowthRow(
        recipe="deep.yaml", parameters_before=1000, parameters=2500, function_preserving=False, seconds=1.5
    )
    with RunMonitor(tmp_path, resumed=None, train_steps=20, tensorboard=True) as monitor:
        monitor.record(Position(step=10, tokens=80, stage=1), growth)
    (found,) = read_metrics(tmp_path / "metrics.jsonl")
    assert found["kind"] == "growth" and found["stage"] == 1 and "loss" not in found
    line = "step 10/20  grown from 1,000 to 2,500 parameters by deep.yaml, which does not keep the function, in 1.5 s"
    assert line in capsys.readouterr().out
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("growth/parameters")] == [(10, 2500.0)]
    assert board.Tensors("growth/recipe/text_summary")[0].tensor_proto.string_val == [b"deep.yaml"]


def test_resuming_before_a_growth_drops_the_rows_of_the_larger_model_at_the_same_step(tmp_path):
    metrics = MetricsFile(tmp_path, None)
    small, large = Position(step=4), Position(step=4, stage=1)
    growth = GrowthRow(recipe="r", parameters_before=1, parameters=2, function_preserving=True, seconds=1.0)
    for position, values in ((small, held_out(3.0)), (large, growth), (large, held_out(2.0))):
        metrics.append(row(position, values))
    metrics.close()
    MetricsFile(tmp_path, small, evaluated_step=4).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [row(small, held_out(3.0))]
    MetricsFile(tmp_path, small, evaluated_step=2).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []  # the evaluation will be repeated


def test_flops_are_those_of_the_formula():
    # hidden 96, 3 layers, 6 heads and 3 kv heads of 8, ffn 250, vocab 101
    matrices = 3 * (96 * 48 + 2 * 96 * 24 + 48 * 96 + 3 * 96 * 250) + 96 * 101
    expected = 2 * matrices + 4 * 3 * 6 * 8 * 32
    for tied in (True, False):
        architecture = small_architecture("llama", tie_word_embeddings=tied)
        assert forward_flops_per_token(architecture, 32) == expected
        assert training_flops_per_token(architecture, 32) == 3 * expected


def test_mfu_is_against_a_stated_peak_and_there_is_none_for_a_cpu():
    peak = device_peak(2e12)
    assert (peak.flops_per_second, peak.origin) == (2e12, "peak_flops of the run file")
    if not torch.cuda.is_available():
        assert device_peak(None) is None
