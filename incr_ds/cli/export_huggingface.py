"""Write any supported checkpoint as a Hugging Face folder."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from incr_ds.cli.command import command, console, loading
from incr_ds.cli.options import Config, Tag, Trust


class Dtype(StrEnum):
    """Dtype of the exported weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@command
def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint to export.")],
    output: Annotated[Path, typer.Argument(help="Folder to publish; must not exist or be empty.")],
    tag: Tag = None,
    config: Config = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of the weights; default: the run's, or the folder's.")
    ] = None,
    trust: Trust = False,
    allow_nonfinite: Annotated[bool, typer.Option("--allow-nonfinite", help="Export NaN and infinity, too.")] = False,
) -> None:
    """Export FOLDER to OUTPUT, which AutoModelForCausalLM.from_pretrained loads."""
    with loading():
        import torch

        from incr_ds.checkpoint.huggingface.export import export_huggingface, own_dtype
        from incr_ds.checkpoint.integrity import open_described
        from incr_ds.cli.run_folder import located
    folder = located(folder)
    source = open_described(folder, tag, config, trust=trust)
    written = own_dtype(source) if dtype is None else getattr(torch, dtype.value)
    notes = export_huggingface(source, output, written, folder, allow_nonfinite=allow_nonfinite)
    name = str(written).removeprefix("torch.")
    console.print(f"published {output}: {source.architecture.num_parameters:,} parameters in {name}")
    for note in notes:
        console.print(f"note: {note}")
