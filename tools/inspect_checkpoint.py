"""Say what a checkpoint is: family, sizes, layout, step, moments, integrity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incr_ds.command import command, console, print_json
from incr_ds.source import open_source
from incr_ds.tables import checkpoint_table
from incr_ds.target.commit import MANIFEST, verify_manifest


@command
def main(
    folder: Annotated[Path, typer.Argument(help="DeepSpeed checkpoint or Hugging Face folder.")],
    tag: Annotated[str | None, typer.Option(help="DeepSpeed tag; default: what `latest` names.")] = None,
    config: Annotated[Path | None, typer.Option(help="Hugging Face config.json, if not in the folder.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Let pickles in the checkpoint run code.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Print what FOLDER holds, reading no tensor."""
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
                "layout": dict(facts.layout),
                "states": list(facts.states),
                "step": facts.step,
                "metadata": dict(facts.metadata),
                "manifest": manifest,
            }
        )
        return
    console.print(checkpoint_table(checkpoint))
    console.print("manifest: every file as published" if manifest else "manifest: none (not published by incr_ds)")


if __name__ == "__main__":
    main()
