"""Pre-trains from a run file: deepspeed launchers/pretrain.py --config RUN.yaml [--set a.b=v ...]."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from incr_ds.cli.command import error_text, loading
from incr_ds.config.fields import load_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError, IncrError
from incr_ds.launch.preflight import check_model, check_run, check_world_size
from incr_ds.launch.stopping import STOPPED, StopRequest, launchers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Config = Annotated[
    list[Path], typer.Option(help="Run file; see ds_configs/runs. Repeatable: later files win, section by section.")
]
Override = Annotated[list[str] | None, typer.Option("--set", help="key.path=value over the run file; repeatable.")]
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="Check the run, print its settings and stages, and end."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the run with every derived number, for a layout of any size, and end.")
]
Json = Annotated[bool, typer.Option("--json", help="With --dry-run: print JSON only.")]
Mfu = Annotated[float | None, typer.Option(help="With --dry-run: the share of the peak to assume for times, as 0.4.")]
PeakTflops = Annotated[
    float | None, typer.Option(help="With --mfu: one device's peak in TFLOP/s; default: the run file's peak_flops.")
]
NoResume = Annotated[bool, typer.Option("--no-resume", help="Refuse to continue a run that has checkpoints.")]
LocalRank = Annotated[int, typer.Option("--local_rank", hidden=True, help="Passed by the deepspeed launcher.")]


@app.command()
def main(
    config: Config,
    override: Override = None,
    print_config: PrintConfig = False,
    dry_run: DryRun = False,
    json: Json = False,
    mfu: Mfu = None,
    peak_tflops: PeakTflops = None,
    no_resume: NoResume = False,
    local_rank: LocalRank = -1,
) -> None:
    """Train a run to its last step. If started again, it continues from its newest complete checkpoint.

    Exit codes: 0 if the run is done, 75 if it was stopped and can be started again, 2 if something in the run file or in
    a file that it names has to be changed first.
    """
    is_first = int(os.environ.get("RANK", "0")) == 0
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    try:
        _check_options(dry_run=dry_run, print_config=print_config, json=json, speed=peak_tflops if mfu is None else mfu)
        with StopRequest(launchers(local_rank >= 0)) as stop:
            run = load_settings(config, RunSettings, override)
            if dry_run:
                if is_first:
                    _show_dry_run(run, mfu, peak_tflops, json=json)
                return
            if print_config:
                stages = check_model(run)
                typer.echo(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), nl=False)
                for line in stages:
                    typer.echo(f"# {line}")
                return
            check_world_size(run.layout)
            with loading():
                check_run(run)
                from incr_ds.train.pretraining import pretrain

            if pretrain(run, resume=not no_resume, stop=stop).stopped:
                raise typer.Exit(STOPPED)
    except (IncrError, OSError) as error:
        if is_first:
            typer.echo(f"pretrain: {error_text(error)}", err=True)
        sys.stderr.flush()
        raise typer.Exit(2) from error


def _check_options(*, dry_run: bool, print_config: bool, json: bool, speed: float | None) -> None:
    """Raise ConfigError for options that would have no effect."""
    if dry_run and print_config:
        raise ConfigError("--dry-run prints what --print-config does, and more; give one of them.")
    for option, given in (("--json", json), ("--mfu and --peak-tflops", speed is not None)):
        if given and not dry_run:
            raise ConfigError(f"{option}: without effect; add --dry-run, or remove it.")


def _show_dry_run(run: RunSettings, mfu: float | None, peak_tflops: float | None, *, json: bool) -> None:
    from incr_ds.cli.dry_run import show_dry_run
    from incr_ds.launch.dry_run import dry_run, stated_speed

    show_dry_run(dry_run(run, stated_speed(run, mfu, peak_tflops)), json=json)


if __name__ == "__main__":
    app()
