"""report.html of training runs: what it says, from which files, and what it does with damaged or hostile ones."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from one_number import make_world, settings, stop_at, stoppable
from run_folders import (
    finished_run,
    growth,
    held_out,
    losses,
    train_row,
    write_checkpoint,
    write_metrics,
    write_settings,
)

from incr_ds.checkpoint.publish import publish
from incr_ds.errors import CheckpointError
from incr_ds.report import figures
from incr_ds.report.history import read_history
from incr_ds.report.run_report import flattened, numbers_of, state_of, write_report
from incr_ds.train import pretraining
from incr_ds.train.loop import DivergedError
from incr_ds.train.metrics import RollBackRow
from incr_ds.train.pretraining import pretrain

TOOL = Path(__file__).parents[2] / "tools" / "report.py"


class Reader(HTMLParser):
    """What a page shows: its headings, its tables by their first cell, the titles of its figures, and its text."""

    def __init__(self, page):
        super().__init__()
        self.headings, self.rows, self.figures, self.tags, self._path, self.text = [], {}, [], set(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag == "img":
            found = dict(attributes)
            assert found["src"].startswith("data:image/png;base64,")
            self.figures.append(found["alt"])
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th"):
            self._row.append("")
        if tag not in ("img", "meta"):
            self._path.append(tag)

    def handle_endtag(self, tag):
        assert self._path.pop() == tag  # every text is escaped: the tags are ours, and they match
        if tag == "tr":
            self.rows[self._row[0]] = self._row[1:]

    def handle_data(self, text):
        self.text += text
        if self._path and self._path[-1] in ("h1", "h2", "h3"):
            self.headings.append(text)
        elif self._path and self._path[-1] in ("td", "th"):
            self._row[-1] += text


def report_of(*folders):
    path = folders[0].parent / "page.html"
    write_report(list(folders), path)
    page = path.read_text()
    assert "://" not in page and "<script" not in page
    return Reader(page)


def test_a_finished_run_shows_its_numbers_figures_settings_and_versions(tmp_path):
    page = report_of(finished_run(tmp_path / "run"))
    assert page.headings[0] == "Training run run"
    assert page.figures == [
        "Training loss", "Held-out loss", "Learning rate", "Gradient norm", "Throughput", "Throughput of a process",
        "Time lost", "Memory of rank 0",
    ]  # fmt: skip
    shown = {key: page.rows[key][0] for key in page.rows if len(page.rows[key]) == 1}
    assert shown["state"] == "finished after step 4" and shown["step"] == "4 of 4" and shown["tokens"] == "400"
    assert shown["training loss, last"] == "2.2500" and shown["held-out loss, last"] == "2.5000"
    assert shown["time of steps"] == "8.0 s" and shown["of it waiting for data"] == "1.0 s"
    assert shown["saving, besides"] == "2.0 s" and shown["peak memory of rank 0"] == "2.00 GB"
    assert shown["model"] == "llama" and shown["MFU, median"] == "-" and shown["FLOPs, teacher included"] == "4.000e+06"
    assert page.rows["code"] == ["run", "4", "2.0000"] and page.rows["prose"] == ["run", "4", "3.0000"]
    assert page.rows["corpus"] == ["f" * 64]
    assert "global_batch_size: 4" in page.text and page.rows["torch"][0] == page.rows["torch"][1]
    assert "started from fresh weights of pico" in page.text and "400 tokens, 4.000e+06 FLOPs in this run" in page.text


def test_the_distance_to_the_teacher_on_held_out_data_is_shown_as_long_as_it_was_measured(tmp_path):
    rows = [(0, held_out(4.0, 0.0)), (2, held_out(3.9, 0.25)), (4, held_out(3.8, 0.125)), (6, held_out(3.7))]
    page = report_of(write_metrics(tmp_path / "taught", rows), write_metrics(tmp_path / "alone", [(0, held_out(4.0))]))
    assert figures.DISTANCE.title in page.figures
    assert page.rows["taught"] == ["0.0000 at step 0", "0.2500 at step 2", "0.1250 at step 4"]
    assert "alone" not in page.rows  # it had no teacher
    assert numbers_of(read_history(tmp_path / "taught", "taught"))["teacher_kl"] == 0.125


def test_the_lines_of_a_figure_are_the_rows(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "png_of", lambda figure: drawn.append(figure) or b"")
    rows = [
        (1, train_row(4.0, alpha=0.5, ce=5.0, divergence=0.75)),
        (2, train_row(3.0)),
        (2, growth()),
        *losses(2.0, start=3),
    ]
    titles = figures.draw_runs([read_history(write_metrics(tmp_path, rows), "run")])
    by_title = {title: figure.axes[0] for title, figure in zip(titles, drawn, strict=True)}
    loss, ce, boundary = by_title["Training loss"].lines
    assert (list(loss.get_xdata()), list(loss.get_ydata())) == ([1, 2, 3], [4.0, 3.0, 2.0])
    assert list(ce.get_ydata()) == [5.0, 3.0, 2.0]
    assert list(boundary.get_xdata()) == [2, 2] and by_title["Training loss"].texts[0].get_text() == "growth"
    distance = by_title["Distance to the teacher"].lines[0].get_ydata()
    assert distance[0] == 0.75 and [value != value for value in distance] == [False, True, True]  # NaN where not asked
    assert list(by_title["Memory of rank 0"].lines[1].get_ydata()) == [2.0, 2.0, 2.0]
    assert by_title["Gradient norm"].get_yscale() == "log"


def test_two_runs_of_different_lengths_stand_side_by_side_with_what_differs(tmp_path):
    first = finished_run(tmp_path / "first", schedule={"train_steps": 4, "learning_rate": 0.05})
    second = finished_run(tmp_path / "second", (4.0, 3.5), schedule={"train_steps": 2, "learning_rate": 0.025}, seed=3)
    page = report_of(first, second)
    assert page.headings[0] == "2 training runs" and page.rows["step"] == ["4 of 4", "2 of 2"]
    differing = {key: page.rows[key] for key in page.rows if key == "seed" or "." in key}
    assert differing == {
        "seed": ["0", "3"], "schedule.train_steps": ["4", "2"], "schedule.learning_rate": ["0.05", "0.025"],
    }  # fmt: skip
    assert page.rows["output"] == [str(first), str(second)]


def test_a_run_that_grew_lists_its_growths(tmp_path):
    page = report_of(
        write_metrics(tmp_path / "run", [*losses(4.0, 3.0), (2, growth("<deep>.yaml")), *losses(2.0, start=3)])
    )
    assert page.rows["run"] == ["2", "<deep>.yaml", "1,000", "2,500", "yes", "1.5 s"]


def test_a_run_that_went_back_lists_where_and_why(tmp_path):
    back = RollBackRow(number=1, from_step=5, first_sample=8, last_sample=19, reason="the loss is <nan>")
    page = report_of(write_metrics(tmp_path / "run", [*losses(4.0, 3.0), (2, back), *losses(2.0, start=3)]))
    assert page.rows["run"] == ["2", "5", "8 to 19", "the loss is <nan>"]
    assert page.headings.count("Roll-backs after a divergence") == 1


def test_sets_of_a_row_are_domains_too(tmp_path):
    sets = {"old": {"loss": 2.0, "perplexity": 7.4}, "new": {"loss": 4.0}, "odd": 3}
    page = report_of(write_metrics(tmp_path / "run", [*losses(4.0), (1, held_out(3.0), {"sets": sets})]))
    assert page.rows["old"] == ["run", "1", "2.0000"] and page.rows["new"] == ["run", "1", "4.0000"]
    assert "odd" not in page.rows and page.rows["held-out"] == ["run", "1", "3.0000"]


def test_a_run_without_validation_says_so(tmp_path):
    page = report_of(write_metrics(tmp_path / "run", losses(4.0, 3.0)))
    assert "Held-out loss" not in page.figures and page.rows["held-out loss, last"] == ["-"]
    assert "None: the run file has no section evaluation." in page.text
    assert "Not known: neither resolved_run.yaml nor a checkpoint states it." in page.text


def test_a_run_that_diverged_says_where_and_leaves_a_gap(tmp_path):
    run = write_metrics(tmp_path / "run", losses(4.0, float("nan")))
    assert state_of(read_history(run, "run")) == "diverged: the loss of step 2 is not a number"
    (run / "checkpoints" / "diverged_step_00000001.1").mkdir(parents=True)
    page = report_of(run)
    assert page.rows["state"] == ["diverged: the loss of step 2 is not a number"]
    assert "set aside because the run diverged: diverged_step_00000001.1" in page.text
    assert page.rows["training loss, last"] == ["-"]


def test_a_run_that_has_only_begun_has_a_page_too(tmp_path):
    run = write_metrics(tmp_path / "run", [])
    write_settings(run)
    page = report_of(run)
    assert page.rows["state"] == ["nothing recorded yet"] and page.figures == []
    write_metrics(run, losses(4.0, 3.0))
    assert state_of(read_history(run, "run")) == "at step 2 of 4: killed, or still training"


def test_damaged_lines_and_files_are_left_out_and_named(tmp_path):
    run = finished_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": oops}\n')
        stream.write(json.dumps({"kind": "train", "step": 10**20, "tokens": 1, "flops": 1, "loss": 1.0}) + "\n")
        stream.write(
            json.dumps(
                {"kind": "train", "step": 5, "tokens": 500, "flops": 1, "loss": 2.0, "mfu": "high", "seconds": 10**400}
            )
            + "\n"
        )
    (run / "checkpoints" / "step_00000009").mkdir()
    (run / "resolved_run.yaml").write_text("a: [")
    page = report_of(run)
    assert "metrics.jsonl, line 7: not valid JSON" in page.text and "1 rows whose step is not possible" in page.text
    assert "step_00000009/manifest.json: missing" in page.text and "resolved_run.yaml" in page.text
    assert page.rows["step"] == ["5 of 4"] and page.rows["time of steps"] == ["8.0 s"]  # settings from the checkpoint


def test_text_of_files_is_text(tmp_path):
    hostile = "</td><script>alert(1)</script><img src=x onerror=alert(1)>$x_{"
    run = write_metrics(
        tmp_path / "<b>run$",
        [*losses(4.0), (1, growth(hostile)), (1, held_out(2.0), {f"validation_loss/{hostile}": 1.0})],
    )
    (run / "end.yaml").write_text(f"end: '{hostile}'\n")
    page = report_of(run)
    assert page.rows["state"] == [hostile] and page.rows["<b>run$"][1] == hostile and page.rows[hostile][0] == "<b>run$"
    assert not {"script", "b"} & page.tags and all(name != hostile for name in page.figures)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"empty: no metrics.jsonl; expected the output folder of a training run"):
        (tmp_path / "empty").mkdir()
        read_history(tmp_path / "empty", "empty")
    merged = write_metrics(tmp_path / "merged", [(1, train_row(1.0), {"run": name}) for name in ("grown", "scratch")])
    with pytest.raises(
        CheckpointError, match=r"rows of 2 runs \(grown, scratch\), merged by a study; name the folders"
    ):
        read_history(merged, "merged")


def test_the_chain_goes_back_to_the_source(tmp_path):
    source = write_checkpoint(tmp_path / "source", 8)
    facts = {
        "recipe": {"target": {}}, "function_preserving": True, "notes": ["one <note>"],
        "source": {"folder": str(source), "kind": "deepspeed zero-1", "step": 8, "parameters": 1000},
        "target": {"parameters": 2500},
    }  # fmt: skip
    with publish(tmp_path / "grown", "deepspeed checkpoint, grown", facts):
        pass
    page = report_of(finished_run(tmp_path / "run", model={"initialize_from": str(tmp_path / "grown")}))
    expected = [
        f"started from {tmp_path}/grown",
        f"{tmp_path}/grown: deepspeed checkpoint, grown",
        "grown from 1,000 to 2,500 parameters, by a recipe that keeps the function; the source is a deepspeed zero-1 at step 8",
        "note: one <note>",
        f"{source}: deepspeed training checkpoint",
        "trained to step 8: 800 tokens",
        "started from fresh weights of pico",
    ]
    places = [page.text.index(line) for line in expected]
    assert places == sorted(places)
    other = report_of(finished_run(tmp_path / "other", model={"initialize_from": str(tmp_path / "gone")}))
    assert f"{tmp_path}/gone" in other.text and "not found from here" in other.text


def test_settings_are_flattened_to_their_keys():
    assert flattened({"a": {"b": 1, "c": [2]}, "d": {}, "e": None}) == {
        "a.b": "1",
        "a.c": "[2]",
        "d": "{}",
        "e": "None",
    }


@pytest.fixture
def world(tmp_path, monkeypatch):
    return make_world(tmp_path, monkeypatch)


def folder_of(run):
    return Path(run.output)


def test_a_run_writes_its_report_when_it_ends_or_diverges_and_a_stopped_one_says_so(world, capsys):
    run = settings(world, "run", report=True)
    world["on_step"] = stop_at(2)
    stoppable(run)
    assert state_of(read_history(folder_of(run), "run")) == "stopped by SIGTERM after step 2"
    assert not (folder_of(run) / "report.html").exists()  # it has no time for that
    world["on_step"] = lambda step, number: float("nan") if step == 2 else number
    with pytest.raises(DivergedError):
        pretrain(run)
    state = state_of(read_history(folder_of(run), "run"))
    assert state.startswith("diverged: step 4: the loss is nan")
    assert "diverged: step 4: the loss is nan" in (folder_of(run) / "report.html").read_text()
    world["on_step"] = lambda step, number: number
    pretrain(run)
    assert f"report: {run.output}/report.html" in capsys.readouterr().out
    assert "finished after step 6" in (folder_of(run) / "report.html").read_text()
    found = numbers_of(read_history(folder_of(run), "run"))
    assert found["state"] == "finished after step 6" and found["step"] == found["last_step"] == 6
    assert found["parameters"] > 10_000 and found["family"] == "llama" and found["tokens"] == 192
    chain = read_history(folder_of(run), "run").chain
    assert [link.kind for link in chain] == ["deepspeed training checkpoint"]
    # What is kept of the settings is a run file, too.
    assert (
        settings(world, "run", report=True).model_dump()
        == type(run).model_validate(read_history(folder_of(run), "run").settings).model_dump()
    )


def test_a_report_that_fails_does_not_fail_the_run(world, capsys, monkeypatch):
    def fails(*given):
        raise ValueError("no fonts")

    monkeypatch.setattr(pretraining, "write_report", fails)
    run = settings(world, "run", report=True)
    assert pretrain(run).position.step == 6
    assert f"report.html: not written (no fonts); tools/report.py {run.output} writes it" in capsys.readouterr().out
    assert not (folder_of(run) / "report.html").exists()


def tool(*arguments, code=0):
    done = subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def test_the_tool_writes_one_page_for_one_run_or_several(tmp_path):
    first, second = finished_run(tmp_path / "first"), finished_run(tmp_path / "second")
    assert f"first: finished after step 4\nwrote {first}/report.html" in tool(first)
    shown = json.loads(tool(first, second, "--output", tmp_path / "both.html", "--json"))
    assert shown["runs"]["second"]["held_out_loss"] == {"loss": 2.5, "code": 2.0, "prose": 3.0}
    assert re.search("<h1>2 training runs</h1>", (tmp_path / "both.html").read_text())
    assert {path.name for path in first.iterdir()} == {
        "metrics.jsonl", "resolved_run.yaml", "end.yaml", "checkpoints", "report.html",
    }  # fmt: skip
    assert not (second / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "run2"], "--output: expected a file for the report of 2 runs"),
        (["run", "run", "--output", "x.html"], "run: given twice"),
        (["nowhere"], "--output nowhere/report.html: expected a file in a folder that exists"),
        (["empty"], "empty: no metrics.jsonl; expected the output folder of a training run"),
        (["run", "--output", "empty"], "--output empty: expected a file in a folder"),
    ],
)
def test_wrong_arguments_are_refused_and_nothing_is_written(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_metrics(tmp_path / "run", losses(1.0))
    (tmp_path / "empty").mkdir()
    assert message in tool(*arguments, code=2)
    assert not list(tmp_path.rglob("*.html"))
