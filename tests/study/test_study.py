import json
import subprocess
import sys
from pathlib import Path

import pytest
from curves import write_run

from incr_ds.errors import CheckpointError
from incr_ds.study.comparison import compare_curves, merge_metrics, read_curve, summary, table_rows, thinned
from incr_ds.study.report import draw_study, write_report
from incr_ds.train.metrics import EvaluationRow, GrowthRow, MetricsFile, Position, read_metrics, row

TOOL = Path(__file__).parents[2] / "tools" / "growth_study.py"


@pytest.fixture
def folders(tmp_path: Path):
    return {
        "source": write_run(tmp_path / "source", [8.0, 5.0, 4.0], 1e6),
        "grown": write_run(tmp_path / "grown", [4.0, 3.5, 3.0, 2.5], 5e6),
        "scratch": write_run(tmp_path / "scratch", [8.0, 6.0, 4.0, 3.2], 4e6),
    }


def study_of(folders):
    return compare_curves(*(read_curve(run, folder) for run, folder in folders.items()))


def test_losses_at_equal_steps_and_the_saving(folders):
    study = study_of(folders)
    assert study.equal_steps == ((0, 4.0, 8.0), (10, 3.5, 6.0), (20, 3.0, 4.0), (30, 2.5, 3.2))
    # Scratch ends at 3.2 with 30 x 4e6 = 1.2e8; grown is first at or below that at step 20, with 1e8; source 2e7.
    assert study.saving.point.step == 20
    assert study.saving.sunk == pytest.approx(1 - 1e8 / 1.2e8)
    assert study.saving.counted == pytest.approx(1 - 1.2e8 / 1.2e8)
    numbers = summary(study)
    assert numbers["flops"] == {"source": 2e7, "grown": 1.5e8, "scratch": 1.2e8}
    assert numbers["flops_grown_with_source"] == 1.7e8
    assert numbers["scratch_loss_reached"]["tokens"] == 2000
    assert numbers["bits_per_byte"] == {"source": 2.0, "grown": 1.25, "scratch": 1.6}


def test_one_sentence_states_both_accountings(folders, tmp_path):
    sentence = dict(table_rows(study_of(folders)))["in one sentence"]
    # Source 2e7, grown 1.5e8, scratch 1.2e8; the losses are 2.5 and 3.2.
    assert sentence == (
        "for 1.42 times the FLOPs as training from scratch, training the small model and growing it gives a loss that is 0.700 "
        "lower (2.500 against 3.200); if the small model exists anyway, it is 1.25 times the FLOPs"
    )
    folders["scratch"] = write_run(tmp_path / "longer", [8.0, 6.0, 4.0, 2.0], 1.7e8 / 30)
    sentence = dict(table_rows(study_of(folders)))["in one sentence"]
    assert (
        "for the same FLOPs as training from scratch" in sentence and "0.500 higher (2.500 against 2.000)" in sentence
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "a.yaml", "--source", "x"],
            "--config and --source: a study file names its own runs; give one or",
        ),
        (["--source", "x"], "--grown, --scratch, --output: expected a value; or give --config STUDY.yaml"),
        (
            ["--config", str(TOOL.parents[1] / "ds_configs/studies/small.yaml"), "--for", "5x"],
            "--for 5x: expected a time",
        ),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message, tmp_path):
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_level_that_is_not_reached_is_said_so(folders, tmp_path: Path):
    folders["grown"] = write_run(tmp_path / "worse", [4.0, 3.9, 3.8, 3.7], 5e6)
    study = study_of(folders)
    assert study.saving is None and summary(study)["scratch_loss_reached"] is None
    assert ("scratch's final loss", "not reached by the grown model") in table_rows(study)


def test_a_run_without_evaluation_is_refused(tmp_path: Path):
    MetricsFile(tmp_path, None).close()
    with pytest.raises(CheckpointError, match="metrics.jsonl: no held-out evaluation; the run file needs"):
        read_curve("grown", tmp_path)
    with pytest.raises(CheckpointError, match="nowhere/metrics.jsonl: cannot be read"):
        read_curve("grown", tmp_path / "nowhere")


def test_a_run_that_grows_has_a_point_on_both_sides_of_the_growth(tmp_path):
    metrics = MetricsFile(tmp_path, None)
    growth = GrowthRow(recipe="r", parameters_before=1, parameters=2, function_preserving=False, seconds=1.0)
    for stage, values in ((0, 3.0), (1, growth), (1, 3.5)):
        if isinstance(values, float):
            values = EvaluationRow(loss=values, perplexity=1.0, bits_per_byte=None, seconds=1.0)
        metrics.append(row(Position(step=4, tokens=32, flops=1e3, stage=stage), values))
    metrics.close()
    assert [(point.step, point.loss) for point in read_curve("grown", tmp_path).points] == [(4, 3.0), (4, 3.5)]
    merge_metrics({"grown": tmp_path}, tmp_path / "merged.jsonl")
    assert [item["kind"] for item in read_metrics(tmp_path / "merged.jsonl")] == ["evaluation", "growth", "evaluation"]


def test_merged_metrics_name_their_run(folders, tmp_path: Path):
    merge_metrics(folders, tmp_path / "metrics.jsonl")
    merged = read_metrics(tmp_path / "metrics.jsonl")
    assert [item["run"] for item in merged] == ["source"] * 3 + ["grown"] * 4 + ["scratch"] * 4
    assert {key: merged[3][key] for key in ("step", "loss")} == {"step": 0, "loss": 4.0}


def test_long_tables_are_thinned_evenly():
    assert thinned(range(21)) == [0, 5, 10, 15, 20]
    assert thinned([1, 2, 3]) == [1, 2, 3]


def test_the_report_is_one_file_and_escapes_what_it_shows(folders, tmp_path: Path):
    study = study_of(folders)
    draw_study(study, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    write_report(study, tmp_path / "loss.png", tmp_path / "report.html", {"Recipe": {"a": "<b>"}}, sample="if x < 3:\n")
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page and "://" not in page
    assert "&lt;b&gt;" in page and "if x &lt; 3:" in page
    assert "grown 2.5000   scratch 3.2000" in page


def test_the_tool_writes_everything(folders, tmp_path: Path):
    options = [part for run, folder in folders.items() for part in (f"--{run}", folder)]
    done = subprocess.run(
        [sys.executable, TOOL, *options, "--output", tmp_path / "out", "--json"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["held_out_loss"] == {"source": 4.0, "grown": 2.5, "scratch": 3.2}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.html", "loss.png", "metrics.jsonl"}
