"""Grow a checkpoint into a larger model, in the layout that the cluster wants."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from incr_ds.advice import FILE as ADVICE_FILE
from incr_ds.command import command, console, print_json, progress_bar
from incr_ds.errors import ConfigError
from incr_ds.grow import GrowthRequest, grow_checkpoint, plan_request
from incr_ds.source import open_source
from incr_ds.suggest import parse_count, parse_layout, suggest_targets
from incr_ds.tables import growth_table, suggestion_table
from incr_ds.target.budget import parse_bytes


@command
def main(
    source: Annotated[Path, typer.Option(help="DeepSpeed checkpoint or Hugging Face folder.")],
    recipe: Annotated[Path | None, typer.Option(help="Growth recipe (YAML); see docs/recipe.md.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to publish.")] = None,
    suggest: Annotated[str | None, typer.Option(help="Parameters, like 3e9: propose targets and end.")] = None,
    layout: Annotated[str, typer.Option(help="For --suggest: tensor x pipeline x data, like 2x2x4.")] = "1x1x1",
    tag: Annotated[str | None, typer.Option(help="DeepSpeed tag; default: what `latest` names.")] = None,
    config: Annotated[Path | None, typer.Option(help="Hugging Face config.json, if not in the source folder.")] = None,
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Print the plan and write nothing.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that write files.")] = 1,
    memory_budget: Annotated[str, typer.Option(help="Anonymous memory of the process, at most.")] = "2GiB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint published at OUTPUT.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Let pickles in the source run code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Grow SOURCE by RECIPE into OUTPUT, or with --suggest say what it could grow to."""
    if suggest is not None:
        opened = open_source(source, tag, config, trust=trust)
        found = suggest_targets(opened.architecture, parse_count(suggest), parse_layout(layout))
        if json:
            print_json({"suggestions": [asdict(item) for item in found]})
        else:
            console.print(suggestion_table(found))
        return
    if recipe is None or output is None:
        raise ConfigError("--recipe and --output: both are needed, unless --suggest asks what a growth could be.")
    budget = parse_bytes(memory_budget)
    planned = plan_request(GrowthRequest(source, recipe, output, tag, config, workers, trust, budget, overwrite))
    if json and plan_only:
        typer.echo(planned.plan.to_json())
        return
    if not json:
        console.print(f"source: {planned.source.facts.kind}, {source}")
        console.print(growth_table(planned))
        for note in planned.notes:
            console.print(f"note: {note}")
    if plan_only:
        return
    with progress_bar(quiet=json) as progress:
        facts = grow_checkpoint(planned, progress)
    if json:
        print_json(facts)
    else:
        console.print(f"published {output} ({planned.num_bytes:,} bytes in {len(planned.files)} files)")
        if planned.plan.grows:
            console.print(
                f"for training: {output / ADVICE_FILE}, a fragment that launchers/pretrain.py takes (--config)"
            )


if __name__ == "__main__":
    main()
