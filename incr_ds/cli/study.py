"""Runs, plans or probes a study from its file, and prints what comes out."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from incr_ds.cli.command import console, loading, print_json
from incr_ds.config.fields import load_settings
from incr_ds.config.study import StudySettings
from incr_ds.errors import ConfigError
from incr_ds.launch.packages import require

if TYPE_CHECKING:
    from incr_ds.study.design import StudyJob
    from incr_ds.study.execution import StudyProgress

_DURATION = re.compile(r"(\d+)(s|m|h)")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
_SHOWN_EVERY = 20  # seconds


def run_study(
    config: Path, *, limit: str | None, plan: bool, probe: int | None, report: Path | None, json: bool
) -> None:
    """Run the study file ``config``, or only ``plan`` or ``probe`` it. Raises IncrError."""
    require("deepspeed", "megatron.core")
    study, seconds = load_settings(config, StudySettings), _seconds(limit)
    with loading():
        from incr_ds.study.design import jobs
        from incr_ds.study.execution import assumed, check_study
    show = _silent if json else _Shown()
    if plan:
        _show_plan(jobs(assumed(study)))
        return
    check_study(study)
    if probe is not None:
        _run_probe(study, probe, seconds, show, json)
    else:
        _run_all(
            study, seconds, show, report or Path(study.output), f"python tools/growth_study.py --config {config}", json
        )


def _run_all(
    study: StudySettings,
    seconds: float | None,
    show: Callable[[StudyProgress], None],
    folder: Path,
    command: str,
    json: bool,
) -> None:
    from incr_ds.study.execution import execute, opened
    from incr_ds.study.pages import table, write_study_report
    from incr_ds.study.summary import collect

    with _interruptible():
        finished = execute(study, seconds, show)
    content = write_study_report(collect(opened(study)), folder, command)
    if json:
        print_json(content)
        return
    _print_table(table(content))
    console.print(f"wrote {folder}/summary.json, table.md, report.html and figures")
    if not finished:
        console.print("not all runs are done; the same command goes on")


def _run_probe(
    study: StudySettings, steps: int, seconds: float | None, show: Callable[[StudyProgress], None], json: bool
) -> None:
    from incr_ds.study.execution import execute, opened
    from incr_ds.study.probe import probe_jobs, ranking
    from incr_ds.study.summary import collect, probe_agreement

    with _interruptible():
        finished = execute(study, seconds, show, lambda design: probe_jobs(design, steps))
    ranked, agreement = ranking(opened(study), steps), probe_agreement(collect(opened(study)))
    if json:
        print_json({"steps": steps, "ranking": [vars(probed) for probed in ranked], "agreement": agreement})
        return
    rows = [["rank", "arm", "loss before growth", f"loss after {steps} steps"]]
    rows += [[str(n), one.arm, f"{one.before:.4f}", f"{one.loss:.4f}"] for n, one in enumerate(ranked, start=1)]
    _print_table(rows)
    found = ", ".join(f"{value:.2f} after {step} steps" for step, value in agreement["rank_correlation"].items())
    console.print(
        "training losses, before any decay; the rank correlation with R_target in this study: "
        f"{found or 'not known yet, since it needs three finished arms'}"
    )
    if not finished:
        console.print("not all probes are done; the same command goes on")


class _Shown:
    """Prints how far a study is, at most every few seconds, and whenever a run ends."""

    def __init__(self) -> None:
        self._done, self._time = -1, 0.0

    def __call__(self, progress: StudyProgress) -> None:
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


def _silent(_: StudyProgress) -> None:
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


def _show_plan(planned: Sequence[StudyJob]) -> None:
    rows = [["run", "steps", "FLOPs", "starts from"]]
    new = [job for job in planned if job.known is None]
    rows += [[job.name, f"{job.steps:,}", f"{job.flops:.2e}", _origin(job.start)] for job in new]
    _print_table(rows)
    known = f"; {len(planned) - len(new)} more are known" if len(new) < len(planned) else ""
    console.print(f"{len(new)} runs, {sum(job.flops for job in new):.3e} FLOPs{known}")


def _origin(start: Path | None) -> str:
    """A checkpoint by its run and step."""
    return "fresh weights" if start is None else "/".join(start.parts[-5:-2] + start.parts[-1:])


def _print_table(rows: list[list[str]]) -> None:
    shown = Table(*rows[0], box=None)
    for row in rows[1:]:
        shown.add_row(*row)
    console.print(shown)
