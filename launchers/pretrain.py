"""Pre-train as a run file says: deepspeed launchers/pretrain.py --config RUN.yaml [--set a.b=v ...]."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from incr_ds.config.fields import load_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import IncrError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Config = Annotated[
    list[Path], typer.Option(help="Run file; see ds_configs/runs. Repeatable: later files win, section by section.")
]
Override = Annotated[list[str] | None, typer.Option("--set", help="key.path=value over the run file; repeatable.")]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved settings and end.")]
NoResume = Annotated[bool, typer.Option("--no-resume", help="Refuse to continue a run that has checkpoints.")]
LocalRank = Annotated[int, typer.Option("--local_rank", hidden=True, help="Passed by the deepspeed launcher.")]


@app.command()
def main(
    config: Config,
    override: Override = None,
    print_config: PrintConfig = False,
    no_resume: NoResume = False,
    local_rank: LocalRank = -1,
) -> None:
    """Train a run to its last step; started again, it goes on from its newest complete checkpoint."""
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    try:
        run = load_settings(config, RunSettings, override)
        if print_config:
            typer.echo(yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False), nl=False)
            return
        from incr_ds.train.loop import pretrain

        pretrain(run, resume=not no_resume)
    except IncrError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            typer.echo(f"pretrain: {error}", err=True)
        sys.stderr.flush()
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
