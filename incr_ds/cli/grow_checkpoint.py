"""Grow a checkpoint into a larger model, in the layout of the cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incr_ds.checkpoint.deepspeed.releases import TESTED
from incr_ds.cli.command import command, loading
from incr_ds.cli.options import Config, Json, Tag, Trust
from incr_ds.errors import ConfigError


@command
def main(
    source: Annotated[Path, typer.Option(help="DeepSpeed checkpoint or Hugging Face folder.")],
    recipe: Annotated[Path | None, typer.Option(help="Growth recipe (YAML); see docs/recipe.md.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to publish.")] = None,
    suggest: Annotated[str | None, typer.Option(help="Parameters, like 3e9: propose targets and end.")] = None,
    write_recipe: Annotated[Path | None, typer.Option(help="For --suggest: write a row as this recipe file.")] = None,
    row: Annotated[int, typer.Option(min=1, help="For --write-recipe: which row.")] = 1,
    layout: Annotated[str, typer.Option(help="For --suggest: tensor x pipeline x data, like 2x2x4.")] = "1x1x1",
    tag: Tag = None,
    config: Config = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Print the plan and write nothing.")] = False,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Threads that write files.")] = 1,
    memory_budget: Annotated[str, typer.Option(help="Anonymous memory of the process, at most.")] = "2GiB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint published at OUTPUT.")] = False,
    target_deepspeed: Annotated[str, typer.Option(help="Release of DeepSpeed that will load the target.")] = TESTED,
    local_rank: Annotated[int | None, typer.Option("--local_rank", hidden=True)] = None,
    data: Annotated[
        Path | None, typer.Option(help="Megatron data set to measure inexact growths on; default: random.")
    ] = None,
    trust: Trust = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Grow NaN and infinity, too.")] = False,
    json: Json = False,
) -> None:
    """Grow SOURCE by RECIPE into OUTPUT, or with --suggest list what it could grow to.

    Under torchrun, deepspeed or srun the processes share the work.
    """
    # The deepspeed launcher adds --local_rank to every command. The environment has the same value.
    if suggest is not None:
        with loading():
            from incr_ds.cli.grow import print_suggestions
            from incr_ds.cli.run_folder import located
        opening = {"tag": tag, "config": config, "trust": trust}
        print_suggestions(
            located(source), suggest, layout, opening, json, None if write_recipe is None else (write_recipe, row)
        )
        return
    if write_recipe is not None:
        raise ConfigError("--write-recipe: needs --suggest, since it writes one of its rows.")
    if recipe is None or output is None:
        raise ConfigError("--recipe and --output: both are required, unless --suggest asks what a growth could be.")
    with loading():
        from incr_ds.cli.grow import grow
        from incr_ds.cli.run_folder import located
        from incr_ds.offline.memory_budget import parse_bytes
        from incr_ds.offline.plan import GrowthRequest
    budget = parse_bytes(memory_budget)
    limits = (workers, trust, budget, overwrite, target_deepspeed, allow_nonfinite)
    request = GrowthRequest(located(source), recipe, output, tag, config, *limits)
    grow(request, data, plan_only, json)
