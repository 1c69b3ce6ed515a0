"""Describe a checkpoint (family, sizes, layout, step, moments, integrity), or list where two of them differ."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from incr_ds.cli.command import command, console, loading, print_json
from incr_ds.cli.options import Config, Json, Tag, Trust
from incr_ds.cli.run_folder import located
from incr_ds.errors import ConfigError


@command
def main(
    folders: Annotated[list[Path], typer.Argument(help="A checkpoint folder; or the word diff and two folders.")],
    tag: Tag = None,
    config: Config = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Print what a folder holds without reading a tensor; or, with `diff A B`, every tensor that differs (exit code 1)."""
    if len(folders) == 3 and str(folders[0]) == "diff":
        if tag is not None or config is not None:
            raise ConfigError(
                "diff compares what `latest` names in each folder; --tag and --config belong to one folder only."
            )
        _differ(folders[1], folders[2], trust, json)
    elif len(folders) == 1:
        _inspect(located(folders[0]), tag, config, trust, json)
    else:
        raise ConfigError("expected one checkpoint folder, or: diff FOLDER FOLDER.")


def _differ(first: Path, second: Path, trust: bool, json: bool) -> None:
    with loading():
        from incr_ds.checkpoint.difference import differences
        from incr_ds.checkpoint.opening import open_source
        from incr_ds.cli.tables import difference_table
    found = list(differences(*(open_source(located(folder), trust=trust) for folder in (first, second))))
    if json:
        print_json({"differences": [asdict(item) for item in found]})
    elif found:
        console.print(difference_table(found))
    else:
        console.print("no difference: every weight and moment is the same")
    sys.exit(1 if found else 0)


def _inspect(folder: Path, tag: str | None, config: Path | None, trust: bool, json: bool) -> None:
    with loading():
        from incr_ds.checkpoint.opening import open_source
        from incr_ds.checkpoint.publish import MANIFEST, verify_manifest
        from incr_ds.cli.tables import checkpoint_table, component_sizes, tensor_tree
    checkpoint = open_source(folder, tag, config, trust=trust)
    manifest = verify_manifest(folder) if (folder / MANIFEST).is_file() else None
    facts, architecture = checkpoint.facts, checkpoint.architecture
    if json:
        print_json(
            {
                "kind": facts.kind,
                "family": architecture.family.model_type,
                "sizes": dict(architecture.sizes),
                "parameters": architecture.num_parameters,
                "active_parameters": architecture.active_parameters,
                "components": component_sizes(architecture),
                "layout": dict(facts.layout),
                "stages": list(facts.stages),
                "tensors": {spec.name: list(spec.shape) for spec in architecture.tensors},
                "states": list(facts.states),
                "no_moments": facts.no_moments,
                "momentum": sorted(facts.momentum),
                "step": facts.step,
                "dtype": facts.dtype,
                "optimizer_groups": [dict(group) for group in facts.optimizer_groups],
                "frozen": list(facts.frozen),
                **facts.recorded.known,
                "notes": [*architecture.notes, *facts.notes],
                "manifest": manifest,
            }
        )
        return
    console.print(checkpoint_table(checkpoint))
    console.print(tensor_tree(architecture))
    for note in (*architecture.notes, *facts.notes):
        console.print(f"note: {note}")
    console.print(
        "manifest: every file as published"
        if manifest
        else "manifest: none (not published by incr_ds); tools/verify_checkpoint.py checks what the format allows"
    )
