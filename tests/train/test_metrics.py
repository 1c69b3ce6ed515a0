import os
import signal

import pytest

from incr_ds.errors import CheckpointError
from incr_ds.testing.memory import small_architecture
from incr_ds.train.flops import device_peak, forward_flops_per_token, training_flops_per_token
from incr_ds.train.metrics import EvaluationRow, MetricsFile, Position, TrainRow, read_metrics, row
from incr_ds.train.monitoring import RunMonitor
from incr_ds.train.signals import StopSignals


def train_row(loss):
    return TrainRow(
        loss=loss, ce=loss, divergence=0.5, alpha=0.25, temperature=1.0, learning_rate=1e-3, gradient_norm=2.0,
        skipped=False, tokens_per_second=100.0, mfu=0.5, seconds=1.0,
    )  # fmt: skip


def held_out(loss):
    return EvaluationRow(loss=loss, perplexity=2.0, bits_per_byte=None, seconds=1.0)


def write(folder, steps, step=None):
    metrics = MetricsFile(folder, step)
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


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step\n')
    with pytest.raises(CheckpointError, match="metrics.jsonl, line 2: not a JSON object"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_the_keys_of_a_row_are_public():
    position = ["kind", "step", "consumed_samples", "tokens", "flops"]
    train = ["loss", "ce", "divergence", "alpha", "temperature", "learning_rate", "gradient_norm", "skipped"]
    assert list(row(Position(), train_row(1.0))) == [*position, *train, "tokens_per_second", "mfu", "seconds"]
    assert list(row(Position(), held_out(1.0))) == [*position, "loss", "perplexity", "bits_per_byte", "seconds"]


def test_the_monitor_keeps_rows_and_shows_plain_lines(tmp_path, capsys):
    with RunMonitor(tmp_path, resumed_step=None, train_steps=20, tensorboard=True) as monitor:
        monitor.record(Position(step=10, tokens=80), train_row(3.25))
        monitor.record(Position(step=10, tokens=80), held_out(3.5))
    assert [item["kind"] for item in read_metrics(tmp_path / "metrics.jsonl")] == ["train", "evaluation"]
    assert list((tmp_path / "tensorboard").glob("events.*"))
    shown = capsys.readouterr().out
    assert "step 10/20  loss 3.2500 (ce 3.2500, kl 0.5000, a 0.250)  lr 1.00e-03  |g| 2.000" in shown
    assert "step 10/20  held-out loss 3.5000  perplexity 2.00\n" in shown


def test_flops_are_those_of_the_formula():
    # hidden 96, 3 layers, 6 heads and 3 kv heads of 8, ffn 250, vocab 101
    matrices = 3 * (96 * 48 + 2 * 96 * 24 + 48 * 96 + 3 * 96 * 250) + 96 * 101
    expected = 2 * matrices + 4 * 3 * 6 * 8 * 32
    for tied in (True, False):
        architecture = small_architecture("llama", tie_word_embeddings=tied)
        assert forward_flops_per_token(architecture, 32) == expected
        assert training_flops_per_token(architecture, 32) == 3 * expected


def test_the_cpu_peak_is_measured_and_says_so():
    peak = device_peak("fp32")
    assert peak.flops_per_second > 1e8
    assert peak.origin.startswith(("measured, fp32", "data sheet"))
    assert device_peak("bf16").origin.startswith(("measured, bf16 or fp32, the faster,", "data sheet"))


def test_signals_set_the_flag_once_and_handlers_come_back():
    before = signal.getsignal(signal.SIGUSR1)
    with StopSignals() as signals:
        assert not signals.agreed()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.agreed()
    assert signal.getsignal(signal.SIGUSR1) is before
