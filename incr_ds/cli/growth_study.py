"""Compare growth with training from scratch: run a study from a study file, or compare three runs that exist."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from incr_ds.cli.command import command, console, loading, print_json
from incr_ds.cli.options import Json
from incr_ds.errors import ConfigError
from incr_ds.launch.packages import require

if TYPE_CHECKING:
    from incr_ds.study.comparison import Study
    from incr_ds.study.execution import Progress

_DURATION = re.compile(r"(\d+)(s|m|h)")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_SHOWN_EVERY = 20  # seconds


@command
def main(
    config: Annotated[
        Path | None, typer.Option(help="Study file; see ds_configs/studies. Goes on where it was.")
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option("--for", help="Train at most this long, like 20m; then report.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print every run with its FLOPs and end.")] = False,
    report: Annotated[Path | None, typer.Option(help="Folder for the report (default: the study's output).")] = None,
    source: Annotated[Path | None, typer.Option(help="Output folder of the source's run.")] = None,
    grown: Annotated[Path | None, typer.Option(help="Output folder of the grown model's run.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Output folder of the run from scratch.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for report.html, loss.png and metrics.jsonl.")] = None,
    growth: Annotated[Path | None, typer.Option(help="Folder that grow_checkpoint.py published.")] = None,
    proof: Annotated[Path | None, typer.Option(help="What verify_checkpoint.py --json printed.")] = None,
    model: Annotated[Path | None, typer.Option(help="Checkpoint or export of the result, to write a sample.")] = None,
    prompt: Annotated[str, typer.Option(help="Beginning of the sample.")] = "def ",
    json: Json = False,
) -> None:
    """Report what growth saves: by a study of many runs (--config), or from three runs (--source, --grown, --scratch)."""
    require("matplotlib")
    runs = {"--source": source, "--grown": grown, "--scratch": scratch, "--output": output}
    if config is not None:
        if given := [name for name, value in runs.items() if value is not None]:
            raise ConfigError(f"--config and {given[0]}: a study file names its own runs; give one or the other.")
        _run_study(config, _seconds(time_limit), plan, report, json)
        return
    if missing := [name for name, value in runs.items() if value is None]:
        raise ConfigError(f"{', '.join(missing)}: expected a value; or give --config STUDY.yaml.")
    assert source and grown and scratch and output
    _compare(source, grown, scratch, output, _facts(growth, proof), (model, prompt), json)


def _compare(
    source: Path,
    grown: Path,
    scratch: Path,
    output: Path,
    facts: dict[str, Any],
    sample: tuple[Path | None, str],
    json: bool,
) -> None:
    with loading():
        from incr_ds.checkpoint.publish import check_writable
        from incr_ds.study.comparison import compare_curves, merge_metrics, read_curve, summary
        from incr_ds.study.report import draw_study, write_report
    study = compare_curves(read_curve("source", source), read_curve("grown", grown), read_curve("scratch", scratch))
    check_writable(output)
    model, prompt = sample
    text = None if model is None else _sample(model, prompt)
    output.mkdir(parents=True, exist_ok=True)
    merge_metrics({"source": source, "grown": grown, "scratch": scratch}, output / "metrics.jsonl")
    draw_study(study, output / "loss.png")
    write_report(study, output / "loss.png", output / "report.html", facts, text)
    if json:
        print_json(summary(study))
    else:
        _show(study, output)


def _run_study(config: Path, seconds: float | None, plan: bool, report: Path | None, json: bool) -> None:
    from incr_ds.config.fields import load_settings
    from incr_ds.config.study import StudySettings

    require("deepspeed", "megatron.core")
    study = load_settings(config, StudySettings)
    with loading():
        from incr_ds.study.design import jobs
        from incr_ds.study.execution import assumed, execute, opened
        from incr_ds.study.pages import table, write_study_report
        from incr_ds.study.summary import collect
    if plan:
        _show_plan(jobs(assumed(study)))
        return
    with _interruptible():
        finished = execute(study, seconds, _ignore if json else _Shown())
    folder = report or Path(study.output)
    content = write_study_report(collect(opened(study)), folder, f"python tools/growth_study.py --config {config}")
    if json:
        print_json(content)
        return
    _print_table(table(content))
    console.print(f"wrote {folder}/summary.json, table.md, report.html and figures")
    if not finished:
        console.print("not all runs are done; the same command goes on")


class _Shown:
    """Prints how far a study is, at most every few seconds, and whenever a run ends."""

    def __init__(self) -> None:
        self._done, self._time = -1, 0.0

    def __call__(self, progress: Progress) -> None:
        import time

        if progress.done == self._done and time.monotonic() - self._time < _SHOWN_EVERY:
            return
        self._done, self._time = progress.done, time.monotonic()
        left = "" if progress.seconds_left is None else f", about {progress.seconds_left / 60:.0f} min left"
        share = progress.flops_done / progress.flops_known if progress.flops_known else 1.0
        console.print(
            f"{progress.done} runs done, {share:.0%} of {progress.flops_known:.2e} FLOPs{left}; training: "
            f"{', '.join(progress.running) or 'nothing'}",
            markup=False,
        )


def _ignore(_: Progress) -> None:
    return None


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM stop a study like Ctrl-C, so that its runs save what they have."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before: Any = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ConfigError(f"--for {text}: expected a time such as 90s, 20m or 2h.")
    return float(int(match[1]) * _SECONDS[match[2]])


def _show_plan(planned: Any) -> None:
    rows = [["run", "steps", "FLOPs", "starts from"]]
    rows += [[job.name, f"{job.steps:,}", f"{job.flops:.2e}", _origin(job.start)] for job in planned]
    _print_table(rows)
    console.print(f"{len(planned)} runs, {sum(job.flops for job in planned):.3e} FLOPs")


def _origin(start: Path | None) -> str:
    """A checkpoint by its run and step."""
    return "fresh weights" if start is None else "/".join(start.parts[-5:-2] + start.parts[-1:])


def _print_table(rows: list[list[str]]) -> None:
    shown = Table(*rows[0], box=None)
    for row in rows[1:]:
        shown.add_row(*row)
    console.print(shown)


def _sample(model: Path, prompt: str) -> str:
    from incr_ds.checkpoint.integrity import open_described
    from incr_ds.offline.generation import Sampling, generate_text

    return generate_text(open_described(model), model, prompt, 120, Sampling(repetition_penalty=1.2))


def _facts(growth: Path | None, proof: Path | None) -> dict[str, Any]:
    from incr_ds.arch.architecture import read_config
    from incr_ds.checkpoint.publish import read_manifest
    from incr_ds.config.json_file import read_text
    from incr_ds.errors import CheckpointError

    facts: dict[str, Any] = {}
    if growth is not None:
        recorded = read_manifest(growth)["facts"]
        facts["Growth"] = {key: recorded[key] for key in ("function_preserving", "notes", "target") if key in recorded}
        facts["Recipe"] = recorded.get("recipe", {})
        facts["Grown model's config"] = read_config(growth / "config.json")
    if proof is not None:
        facts["Source and grown model on the same tokens"] = read_text(proof, CheckpointError)
    return facts


def _show(study: Study, output: Path) -> None:
    from incr_ds.study.comparison import table_rows

    table = Table(show_header=False, title="growth against scratch", title_justify="left")
    for label, value in table_rows(study):
        table.add_row(label, value)
    console.print(table)
    console.print(f"wrote {output}/report.html, loss.png, metrics.jsonl")
