"""Continue a text with a checkpoint, as a quick look at a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incr_ds.cli.command import command, loading, print_json
from incr_ds.cli.options import Config, Json, Tag, Trust


@command
def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint in any supported format.")],
    prompt: Annotated[str, typer.Option(help="Beginning of the text.")],
    tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens to add.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of probability to draw from.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(min=1.0, help="Above 1: less repetition.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed for drawing tokens.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, if FOLDER has none.")] = None,
    tag: Tag = None,
    config: Config = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Print PROMPT and what the model in FOLDER adds to it. Runs on the CPU in fp32."""
    with loading():
        from incr_ds.checkpoint.integrity import open_described
        from incr_ds.cli.run_folder import located
        from incr_ds.offline.generation import Sampling, generate_text
    checkpoint = open_described(located(folder), tag, config, trust=trust)
    sampling = Sampling(temperature=temperature, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed)
    text = generate_text(checkpoint, tokenizer or folder, prompt, tokens, sampling)
    if json:
        print_json({"prompt": prompt, "text": text})
    else:
        typer.echo(text)
