"""Compare growth with training from scratch: run a study from a study file, or compare three runs that exist."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from incr_ds.cli.command import command, console, loading, print_json
from incr_ds.cli.options import Json
from incr_ds.cli.study import run_study
from incr_ds.errors import ConfigError
from incr_ds.launch.packages import require

if TYPE_CHECKING:
    from incr_ds.study.comparison import Study


@command
def main(
    config: Annotated[
        Path | None, typer.Option(help="Study file; see ds_configs/studies. Goes on where it was.")
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option("--for", help="Train at most this long, like 20m; then report.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print every run with its FLOPs and end.")] = False,
    probe: Annotated[
        int | None, typer.Option(min=1, help="Train each recipe this many steps after growth; rank them.")
    ] = None,
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
        run_study(config, limit=time_limit, plan=plan, probe=probe, report=report, json=json)
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
