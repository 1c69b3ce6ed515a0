"""Fit the operators of a growth on a few hundred batches before the growth, and write a recipe for grow_checkpoint.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incr_ds.cli.command import command, console, loading, print_json, progress_bar
from incr_ds.cli.options import Json
from incr_ds.errors import ConfigError
from incr_ds.launch.packages import require


@command
def main(
    config: Annotated[Path, typer.Option(help="Run file whose model.initialize_from names source and recipe.")],
    output: Annotated[Path, typer.Option(help="Recipe to write (YAML).")],
    override: Annotated[list[str] | None, typer.Option("--set", help="key.path=value over the run file.")] = None,
    json: Json = False,
) -> None:
    """Learn factors of the recipe's operators with the run's data, batches, schedule and AdamW. The source is frozen."""
    from incr_ds.checkpoint.publish import check_writable, write_atomically
    from incr_ds.config.fields import load_settings
    from incr_ds.config.training import RunSettings
    from incr_ds.config.yaml_file import yaml_text

    if output.exists():
        raise ConfigError(f"{output}: exists already; choose another name.")
    check_writable(output.parent)
    run = load_settings(config, RunSettings, override)
    require("deepspeed", "megatron.core")
    with loading():
        from incr_ds.train.fitting import fit_growth
    steps = run.schedule.last_step - run.schedule.start_step
    with progress_bar(quiet=json) as progress:
        fit = fit_growth(run, lambda step, loss: progress("fitting", step + 1, steps) if progress else None)
    write_atomically(output, yaml_text(fit.recipe.model_dump(exclude_unset=True)))
    found = {"recipe": str(output), "steps": steps, "loss_before": fit.before, "loss_after": fit.after}
    if json:
        print_json(found)
        return
    console.print(
        f"held-out loss {fit.before:.4f} with the recipe's own operators, {fit.after:.4f} with the fitted ones"
    )
    if fit.after >= fit.before:
        console.print("the fit did not help: try more steps or another learning rate, or use the recipe as it was")
    console.print(f"wrote {output}")
