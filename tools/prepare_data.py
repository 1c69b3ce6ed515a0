"""Make Megatron .bin/.idx data sets, and if wanted a tokenizer, from text files."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from incr_ds.errors import IncrError

app = typer.Typer(add_completion=False)
Input = Annotated[list[Path], typer.Option("--input", help="Folder or file; repeatable.")]
Output = Annotated[Path, typer.Option("--output", help="PREFIX of every file written.")]
Tokenizer = Annotated[str, typer.Option(help="A transformers tokenizer folder, or train:sentencepiece.")]
Vocabulary = Annotated[int, typer.Option("--vocab-size", help="Pieces of a trained tokenizer.")]
HeldOut = Annotated[float, typer.Option(help="Fraction of the documents kept for validation.")]
Pattern = Annotated[str, typer.Option(help="File names to read in folders, comma separated.")]
MaxBytes = Annotated[int | None, typer.Option(help="Read at most this much text.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON.")]


@app.command()
def main(
    input: Input,
    tokenizer: Tokenizer,
    output: Output,
    vocab_size: Vocabulary = 4096,
    held_out: HeldOut = 0.05,
    pattern: Pattern = "*.py,*.txt,*.md,*.jsonl",
    max_bytes: MaxBytes = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Tokenize text: one document a file (.jsonl: one a line, key text); equal documents stay in one split."""
    from incr_ds.train.corpus import CorpusRequest, prepare_corpus

    request = CorpusRequest(
        inputs=tuple(input),
        tokenizer=tokenizer,
        output=output,
        vocabulary_size=vocab_size,
        held_out=held_out,
        patterns=tuple(pattern.split(",")),
        max_bytes=max_bytes,
        overwrite=overwrite,
    )
    console = Console(stderr=as_json)
    try:
        if console.is_terminal:
            with Progress(console=console) as bar:
                task = bar.add_task("tokenizing", total=None)
                facts = prepare_corpus(request, lambda done, total: bar.update(task, completed=done, total=total))
        else:
            facts = prepare_corpus(request)
    except IncrError as error:
        typer.echo(f"prepare_data: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(asdict(facts), indent=2))
        return
    for split, counts in facts.splits.items():
        typer.echo(f"{split}: {counts.documents} documents, {counts.bytes} bytes, {counts.tokens} tokens")
    typer.echo(f"vocabulary: {facts.vocabulary_size}; tokenizer: {facts.tokenizer}; facts: {output}_facts.json")
    if facts.left_out_files:
        typer.echo(f"left out by --max-bytes: {facts.left_out_files} files, {facts.left_out_bytes} bytes")
    if facts.not_text:
        typer.echo(f"skipped, not UTF-8: {len(facts.not_text)} files, listed in the facts")


if __name__ == "__main__":
    app()
