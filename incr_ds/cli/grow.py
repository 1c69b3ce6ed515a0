"""The work and the output of tools/grow_checkpoint.py after its options are parsed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from incr_ds.checkpoint.integrity import open_described
from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import check_writable, write_atomically
from incr_ds.cli.command import USER_MISTAKE, console, print_json, progress_bar
from incr_ds.cli.tables import growth_table, suggestion_table
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError, IncrError
from incr_ds.growth.advice import FILE as ADVICE_FILE
from incr_ds.growth.suggest import Suggestion, parse_count, parse_layout, recipe_text, suggest_targets
from incr_ds.offline.compare import Tokens, compare, usual_tokens
from incr_ds.offline.launcher import join_process_group
from incr_ds.offline.plan import GrowthRequest, PlannedGrowth, plan_request
from incr_ds.offline.process_group import ProcessGroup, agree
from incr_ds.offline.run import grow_checkpoint


def print_suggestions(
    source: Path,
    parameters: str,
    layout: str,
    opening: Mapping[str, Any],
    json: bool,
    write: tuple[Path, int] | None = None,
) -> None:
    """Print targets with about ``parameters`` parameters that ``source`` can grow to.

    ``opening`` are the options of ``open_described``. ``write`` is a recipe file to write, and the row for it.
    """
    degrees = parse_layout(layout)
    if write is not None:
        if write[0].exists():
            raise ConfigError(f"--write-recipe {write[0]}: exists already; choose another name.")
        check_writable(write[0].parent)
    opened = open_described(source, **opening)
    found = suggest_targets(opened.architecture, parse_count(parameters), degrees)
    if write is not None:
        _write_recipe(*write, found, degrees, has_moments="exp_avg" in opened.facts.states)
    if json:
        print_json({"suggestions": [asdict(item) for item in found]})
        return
    console.print(suggestion_table(found))
    if write is not None:
        console.print(f"wrote {write[0]}: row {write[1]}")


def _write_recipe(
    path: Path, row: int, found: Sequence[Suggestion], layout: ParallelLayout, *, has_moments: bool
) -> None:
    if row > len(found):
        raise ConfigError(f"--row {row}: there are only {len(found)} rows.")
    write_atomically(path, recipe_text(found[row - 1], layout, has_moments=has_moments))


def grow(request: GrowthRequest, data: Path | None, plan_only: bool, json: bool) -> None:
    """Plan ``request`` and, unless ``plan_only``, run it in all processes of the launch."""
    with join_process_group() as group:
        try:
            _grow(request, group, data, plan_only, json)
        except IncrError:
            if group.rank:
                sys.exit(USER_MISTAKE)  # the first process prints the message once
            raise


def _grow(request: GrowthRequest, group: ProcessGroup, data: Path | None, plan_only: bool, json: bool) -> None:
    planned = agree(group, lambda: plan_request(request))
    quiet = json or group.rank > 0
    if json and plan_only and not group.rank:
        typer.echo(planned.plan.to_json())
    if not quiet:
        console.print(f"source: {planned.source.facts.kind}, {request.source}")
        console.print(growth_table(planned))
        for note in planned.notes:
            console.print(f"note: {note}")
    if plan_only:
        return
    # Before anything is written.
    tokens = None if planned.plan.function_preserving else agree(group, lambda: _tokens(planned, data))
    with progress_bar(quiet=quiet) as progress:
        facts = grow_checkpoint(planned, progress, group)
    if not quiet:
        for note in facts["notes"][len(planned.notes) :]:  # notes from writing
            console.print(f"note: {note}")
        console.print(f"published {request.output} ({planned.num_bytes:,} bytes in {len(planned.files)} files)")
        if (request.output / ADVICE_FILE).is_file():
            advice = request.output / ADVICE_FILE
            console.print(f"for training: {advice}, a run-file fragment for launchers/pretrain.py (--config)")
    measured = {} if tokens is None or group.rank else _step_0(planned, tokens)
    if tokens and measured and not quiet:
        console.print(_described(measured, tokens))
    if json and not group.rank:
        print_json({**facts, "step_0": measured})


def _tokens(planned: PlannedGrowth, data: Path | None) -> Tokens:
    return usual_tokens(planned.source, [planned.request.source], data, trust=planned.request.trust)


def _step_0(planned: PlannedGrowth, tokens: Tokens) -> dict[str, Any]:
    """Loss before and after a growth that does not keep the function, or how much memory both models need."""
    source, target = planned.source.architecture, planned.plan.target
    needed = 4 * (source.num_parameters + target.num_parameters)
    if needed > planned.request.memory_budget:
        return {"needed_bytes": needed}
    return asdict(compare(planned.source, open_source(planned.request.output), tokens.batches))


def _described(measured: dict[str, Any], tokens: Tokens) -> str:
    if "needed_bytes" in measured:
        return (
            f"loss at step 0: not measured; both models in memory need {measured['needed_bytes']:,} bytes, more than "
            "--memory-budget. tools/verify_checkpoint.py OUTPUT --against SOURCE measures it."
        )
    if measured["problem"]:
        return f"loss at step 0: {measured['problem']}"
    change = measured["target_loss"] - measured["source_loss"]
    return (
        f"loss at step 0: {measured['source_loss']:.4f} (source) to {measured['target_loss']:.4f}, {change:+.4f}, over "
        f"{measured['tokens']} tokens {tokens.origin}"
    )
