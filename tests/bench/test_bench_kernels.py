"""The benchmark runs on a machine without CUDA, says what it could not run, and writes what it found."""

import json
from pathlib import Path

import pytest
import torch
from bench_kernels import SHAPES, Grid, main

from incr_ds.bench.measure import measure_grid, measure_shape
from incr_ds.bench.report import result_table
from incr_ds.bench.variants import VARIANTS, Variant, eager_loss, make_problem
from incr_ds.losses.distillation import distillation_loss
from incr_ds.losses.planner import LossShape

CPU = torch.device("cpu")
TINY = LossShape(16, 130, 8, 6)


def test_every_variant_of_this_project_runs_and_the_floor_is_the_least():
    here = {"floor", "ours", "torch"}
    ours = [one for one in VARIANTS if one.kind in here and one.name not in ("torch.compile", "incr_ds, CUDA rows")]
    found = measure_shape(TINY, ours, 3, torch.float32, CPU)
    assert [one.variant for one in found] == [one.name for one in ours]
    assert all(one.absent is None and one.milliseconds > 0 for one in found)


def test_cuda_rows_say_why_they_are_absent():
    (rows,) = [one for one in VARIANTS if one.name == "incr_ds, CUDA rows"]
    (found,) = measure_shape(TINY, [rows], 3, torch.float32, CPU)
    assert "'cuda' cannot run: the tensors are on 'cpu'" in found.absent


def test_variants_that_say_they_compute_the_same_do():
    problem = make_problem(TINY, torch.float64, CPU)
    losses = {}
    for name, settings in (("ours", {}), ("chunks", {"budget_bytes": 9_000}), ("recompute", {"backend": "recompute"})):
        losses[name] = distillation_loss(*problem.taught, alpha=0.5, **settings).loss
    eager = eager_loss(problem)
    torch.testing.assert_close(losses["ours"], eager.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["ours"], losses["chunks"])
    torch.testing.assert_close(losses["ours"], losses["recompute"])


def test_gradients_that_are_handed_out_are_counted():
    names = ["products only", "incr_ds", "incr_ds, into an fp32 buffer", "incr_ds, recompute"]
    chosen = [one for name in names for one in VARIANTS if one.name == name]
    found = measure_shape(TINY, chosen, 1, torch.float32, CPU)
    hidden, head = 16 * 8 * 4, 130 * 8 * 4
    assert [one.gradient_bytes for one in found] == [hidden + head, hidden + head, hidden, hidden + head]
    assert [one.extra_bytes for one in found] == [None] * 4


def raises(error):
    def make(problem):
        raise error

    return make


def test_what_is_missing_is_listed_with_its_reason():
    absent = [
        Variant("gone", "other", "CE", raises(ImportError("No module named 'gone'"))),
        Variant("large", "other", "CE", raises(torch.cuda.OutOfMemoryError("too large"))),
        VARIANTS[0],
    ]
    found = measure_shape(TINY, absent, 1, torch.float32, CPU)
    assert [one.absent for one in found] == ["not available: No module named 'gone'", "out of memory", None]
    table = result_table(found)
    cells = table.rows
    assert cells[0] == ("16", "130", "gone", "CE", "not available: No module named 'gone'", "", "", "")
    assert cells[2][:4] == ("16", "130", "products only", "nothing") and cells[2][5] == "100%"
    assert len(cells[2]) == len(table.headings)


def test_no_shape_begins_after_the_time_is_over():
    assert list(measure_grid([TINY, TINY], VARIANTS[:1], 1, torch.float32, CPU, seconds=-1)) == []


def test_the_command_writes_numbers_table_and_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(SHAPES, Grid.small, [TINY])
    arguments = [
        "bench_kernels.py",
        "--output",
        str(tmp_path),
        "--repeats",
        "2",
        "--only",
        "products",
        "--only",
        "incr_ds",
        "--json",
    ]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "loss.json").read_text())
    shape = printed["shapes"][0]
    assert shape["flops"] == 2 * 16 * 130 * (3 * 8 + 6)
    floor = next(one for one in printed["measurements"] if one["kind"] == "floor")
    assert shape["floor_tflops"] == pytest.approx(shape["flops"] / floor["milliseconds"] / 1e9)
    table = (tmp_path / "loss.md").read_text()
    assert "| 16 | 130 | products only | nothing |" in table
    assert [line.split("|")[3].strip() for line in table.splitlines() if "not available" in line] == [
        "incr_ds, CUDA rows"
    ]
    for figure in ("loss.svg", "loss-scaling.svg"):
        assert "<svg" in (tmp_path / figure).read_text()


def test_an_unknown_variant_is_a_mistake_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["bench_kernels.py", "--output", str(tmp_path), "--only", "cutlass"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "no variant has such a name; the variants are: products only, incr_ds" in capsys.readouterr().err
