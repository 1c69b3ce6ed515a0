"""The report of one run or of several side by side: report.html, from what is on disk alone."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.publish import installed_versions, write_atomically
from incr_ds.config.yaml_file import yaml_text
from incr_ds.report.figures import draw_runs
from incr_ds.report.history import VALIDATION, History, names_of, number, numbers, read_history, set_name
from incr_ds.report.page import bullets, document, folded, heading, paragraph, picture, preformatted, table
from incr_ds.train.metrics import FILE

REPORT = "report.html"
MOST_PROBLEMS = 20


def write_report(folders: Sequence[Path], path: Path) -> dict[str, Any]:
    """Write the report of the runs in ``folders`` to ``path``. Returns its numbers as JSON content, by run.

    Raises CheckpointError for a folder that is not a run's, and writes nothing then.
    """
    names = names_of(folders)
    runs = [read_history(folder, name) for folder, name in names.items()]
    write_atomically(path, run_page(runs))
    return {run.name: numbers_of(run) for run in runs}


def run_page(runs: Sequence[History]) -> str:
    """The whole page."""
    title = f"Training run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} training runs"
    parts = [heading(title, 1), *_warnings(runs), _summary(runs)]
    parts += [part for name, png in draw_runs(runs).items() for part in (heading(name), picture(name, png))]
    parts += [
        *_held_out(runs),
        *_distance(runs),
        *_growths(runs),
        *_roll_backs(runs),
        *_configuration(runs),
        *_provenance(runs),
        *_versions(runs),
    ]
    return document(title, parts)


def numbers_of(run: History) -> dict[str, Any]:
    """The run in numbers: where it stands, its last losses, its speed and its memory. None where nothing is known."""
    last = run.rows[-1] if run.rows else {}
    evaluated = run.evaluated[-1] if run.evaluated else {}
    steps = numbers(run.trained, "seconds")
    return {
        "state": state_of(run),
        "step": last.get("step"),
        "last_step": run.last_step,
        "tokens": last.get("tokens"),
        "flops": number(last, "flops"),
        "family": run.model and run.model[0],
        "parameters": run.model and run.model[1],
        "training_loss": number(run.trained[-1], "loss") if run.trained else None,
        "held_out_loss": {key.removeprefix(VALIDATION): number(evaluated, key) for key in run.domains},
        "bits_per_byte": number(evaluated, "bits_per_byte"),
        "teacher_kl": _last(numbers(run.evaluated, "teacher_kl")),
        "skipped_steps": last.get("skipped_steps"),
        "tokens_per_second": _median(run, "tokens_per_second"),
        "tflops_per_rank": _median(run, "tflops_per_rank"),
        "mfu": _median(run, "mfu"),
        "seconds": sum(steps) if steps else None,
        "data_seconds": _sum(run, "data_seconds"),
        "save_seconds": _sum(run, "save_seconds"),
        "peak_memory_bytes": max(numbers(run.trained, "peak_memory_bytes"), default=None),
    }


def state_of(run: History) -> str:
    """How the run ended, or how far it is."""
    if run.end is not None:
        return run.end
    if not run.rows:
        return "nothing recorded yet"
    if run.trained and number(run.trained[-1], "loss") is None:
        return f"diverged: the loss of step {run.trained[-1]['step']:,} is not a number"
    step, last = run.rows[-1]["step"], run.last_step
    if last is None:
        return f"at step {step:,}"
    return f"finished at step {step:,}" if step >= last else f"at step {step:,} of {last:,}: killed, or still training"


def _median(run: History, key: str) -> float | None:
    found = numbers(run.trained, key)
    return statistics.median(found) if found else None


def _last(found: Sequence[float]) -> float | None:
    return found[-1] if found else None


def _sum(run: History, key: str) -> float | None:
    found = numbers(run.trained, key)
    return sum(found) if found else None


def _warnings(runs: Sequence[History]) -> list[str]:
    problems = [problem for run in runs for problem in run.problems]
    shown = problems[:MOST_PROBLEMS]
    more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
    diverged = [
        f"{run.name}: checkpoints that were set aside because the run diverged: {', '.join(run.diverged)}"
        for run in runs
        if run.diverged
    ]
    parts = [paragraph("What could not be read is left out:", "warning"), bullets([*shown, *more])] if problems else []
    return [*(paragraph(line, "warning") for line in diverged), *parts]


def _summary(runs: Sequence[History]) -> str:
    found = [numbers_of(run) for run in runs]
    rows = [
        ["state", *(item["state"] for item in found)],
        ["model", *(item["family"] or "-" for item in found)],
        ["parameters", *(_count(item["parameters"]) for item in found)],
        ["step", *(_of(item["step"], item["last_step"]) for item in found)],
        ["tokens", *(_count(item["tokens"]) for item in found)],
        ["FLOPs, teacher included", *(_shown(item["flops"], ".3e") for item in found)],
        ["training loss, last", *(_shown(item["training_loss"], ".4f") for item in found)],
        ["held-out loss, last", *(_shown(item["held_out_loss"].get("loss"), ".4f") for item in found)],
        ["bits per byte", *(_shown(item["bits_per_byte"], ".4f") for item in found)],
        ["skipped steps", *(_count(item["skipped_steps"]) for item in found)],
        ["tokens/s, median", *(_shown(item["tokens_per_second"], ",.0f") for item in found)],
        ["TFLOP/s per process, median", *(_shown(item["tflops_per_rank"], ".3g") for item in found)],
        ["MFU, median", *(_shown(item["mfu"], ".1%") for item in found)],
        ["time of steps", *(_time(item["seconds"]) for item in found)],
        ["of it waiting for data", *(_time(item["data_seconds"]) for item in found)],
        ["saving, besides", *(_time(item["save_seconds"]) for item in found)],
        ["peak memory of rank 0", *(_gigabytes(item["peak_memory_bytes"]) for item in found)],
        ["recorded until", *(_written(run.folder / FILE) for run in runs)],
    ]
    return table(rows, ["", *(run.name for run in runs)])


def _held_out(runs: Sequence[History]) -> list[str]:
    domains = list(dict.fromkeys(key for run in runs for key in run.domains))
    if not domains:
        return [heading("Held-out evaluation"), paragraph("None: the run file has no section evaluation.")]
    rows = [
        [set_name(key), run.name, _count(row["step"]), _shown(number(row, key), ".4f")]
        for key in domains
        for run in runs
        for row in (run.evaluated[:1] + run.evaluated[1:][-1:])
    ]
    return [heading("Held-out loss, first and last"), table(rows, ["data", "run", "step", "nats per token"])]


def _distance(runs: Sequence[History]) -> list[str]:
    """How the student's distance to its teacher moves, as long as the teacher runs."""
    rows = []
    for run in runs:
        measured = [row for row in run.evaluated if number(row, "teacher_kl") is not None]
        if not measured:
            continue
        farthest = max(measured, key=lambda row: number(row, "teacher_kl") or 0.0)
        shown = (measured[0], farthest, measured[-1])
        rows.append([run.name, *(f"{number(row, 'teacher_kl'):.4f} at step {_count(row['step'])}" for row in shown)])
    head = ["run", "first", "farthest", "last while it taught"]
    title = heading("Distance to the teacher on held-out data, KL(teacher || student) in nats per token")
    return [title, table(rows, head)] if rows else []


def _growths(runs: Sequence[History]) -> list[str]:
    rows = [
        [
            run.name,
            _count(row["step"]),
            str(row.get("recipe", "")),
            _count(row.get("parameters_before")),
            _count(row.get("parameters")),
            "yes" if row.get("function_preserving") else "no",
            _time(number(row, "seconds")),
        ]
        for run in runs
        for row in run.grown
    ]
    head = ["run", "step", "recipe", "parameters before", "parameters", "function-preserving", "took"]
    return [heading("Growth on the way"), table(rows, head)] if rows else []


def _roll_backs(runs: Sequence[History]) -> list[str]:
    rows = [
        [
            run.name,
            _count(row["step"]),
            _count(row.get("from_step")),
            f"{_count(row.get('first_sample'))} to {_count(row.get('last_sample'))}",
            str(row.get("reason", "")),
        ]
        for run in runs
        for row in run.rolled_back
    ]
    head = ["run", "back to step", "from step", "samples skipped", "reason"]
    return [heading("Roll-backs after a divergence"), table(rows, head)] if rows else []


def _configuration(runs: Sequence[History]) -> list[str]:
    known = [run for run in runs if run.settings]
    if not known:
        return [heading("Configuration"), paragraph("Not known: neither resolved_run.yaml nor a checkpoint states it.")]
    parts = [heading("Configuration")]
    if len(known) > 1:
        flat = {run.name: flattened(run.settings) for run in known}
        keys = list(dict.fromkeys(key for settings in flat.values() for key in settings))
        rows = [
            [key, *(settings.get(key, "") for settings in flat.values())]
            for key in keys
            if len({settings.get(key) for settings in flat.values()}) > 1
        ]
        parts.append(
            table(rows, ["what differs", *flat]) if rows else paragraph("The settings of all runs are the same.")
        )
    return [*parts, *(folded(f"All settings of {run.name}", preformatted(yaml_text(run.settings))) for run in known)]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Every setting by its dotted key, as text."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        found |= flattened(value, f"{name}.") if isinstance(value, Mapping) and value else {name: str(value)}
    return found


def _provenance(runs: Sequence[History]) -> list[str]:
    parts = [heading("Where the model comes from")]
    for run in runs:
        if len(runs) > 1:
            parts.append(heading(run.name, 3))
        if not run.chain:
            parts.append(paragraph("From fresh weights, as far as is known; there is no checkpoint yet."))
        for link in run.chain:
            parts += [paragraph(f"{link.folder}{f': {link.kind}' if link.kind else ''}"), bullets(link.lines)]
        if run.data:
            parts += [paragraph("Data, with the fingerprint of its tokens:")]
            parts.append(table([[prefix, fingerprint] for prefix, fingerprint in run.data.items()]))
    return parts


def _versions(runs: Sequence[History]) -> list[str]:
    here = installed_versions()
    columns = {**{run.name: run.versions for run in runs if run.versions}, "this report": here}
    packages = list(dict.fromkeys(name for versions in columns.values() for name in versions))
    rows = [[name, *(versions.get(name, "") for versions in columns.values())] for name in packages]
    return [heading("Versions"), table(rows, ["", *columns])]


def _of(step: Any, last: int | None) -> str:
    return _count(step) if last is None else f"{_count(step)} of {last:,}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 3600:.2f} h"


def _gigabytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:.2f} GB"


def _written(path: Path) -> str:
    return f"{datetime.fromtimestamp(path.stat().st_mtime, UTC):%Y-%m-%d %H:%M} UTC"
