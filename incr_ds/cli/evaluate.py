"""Held-out loss of a checkpoint, on the samples that training evaluates on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from incr_ds.cli.command import command, console, loading, print_json, progress_bar
from incr_ds.cli.options import Config, Json, Tag, Trust
from incr_ds.launch.packages import require


@command
def main(
    folder: Annotated[Path, typer.Argument(help="DeepSpeed checkpoint or Hugging Face folder.")],
    data: Annotated[str, typer.Option(help="Held-out Megatron data set: path without .bin.")],
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Samples to evaluate.")] = 64,
    tag: Tag = None,
    config: Config = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Print loss, perplexity and bits per byte of FOLDER on DATA."""
    require("megatron.core")
    with loading():
        from incr_ds.checkpoint.integrity import open_described
        from incr_ds.cli.run_folder import located
        from incr_ds.train.evaluation import evaluate_checkpoint
    checkpoint = open_described(located(folder), tag, config, trust=trust)
    with progress_bar(quiet=json) as progress:
        found = evaluate_checkpoint(checkpoint, data, sequence_length, samples, progress=progress)
    if json:
        print_json(asdict(found))
        return
    bits = "" if found.bits_per_byte is None else f", {found.bits_per_byte:.4f} bits per byte"
    console.print(f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f}{bits} over {found.tokens:,} tokens")
