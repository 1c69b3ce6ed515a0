"""Make Megatron .bin/.idx data sets, and optionally a tokenizer, from text in files of many kinds."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from incr_ds.cli.command import command, console, loading, print_json, progress_bar
from incr_ds.cli.options import Json

if TYPE_CHECKING:
    from incr_ds.data.corpus import CorpusFacts

_EVERY_KIND = "*.py,*.txt,*.md,*.jsonl, these and .json compressed (.gz, .zst), *.parquet,*.arrow"


@command
def main(
    input: Annotated[list[Path], typer.Option("--input", help="Folder or file; repeatable.")],
    tokenizer: Annotated[
        str,
        typer.Option(help="A tokenizer folder, a tokenizer.json, a sentencepiece .model, or train:sentencepiece."),
    ],
    output: Annotated[Path, typer.Option(help="PREFIX of every file written.")],
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size of a trained tokenizer.")] = 4096,
    held_out: Annotated[float, typer.Option(help="Fraction of the documents kept for validation.")] = 0.05,
    text_key: Annotated[
        str, typer.Option(help="Key of JSON lines, or column of tables, that holds the text.")
    ] = "text",
    append_eos: Annotated[bool, typer.Option(help="End each document with the end-of-text token.")] = True,
    eos_token: Annotated[str | None, typer.Option(help="That token (default: the tokenizer's own).")] = None,
    pattern: Annotated[
        str | None, typer.Option(help=f"File names to read in folders, comma separated (default: {_EVERY_KIND}).")
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Read files of at most this many bytes in all.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that tokenize (default: one per CPU core).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Let the tokenizer folder run its own code.")] = False,
    json: Json = False,
) -> None:
    """Tokenize text. A file is a document; in JSON lines a line is, in Parquet and Arrow a row. Equal documents share a split.

    The same command continues a run that was killed. The result is the same for any number of workers.
    """
    with loading():
        from incr_ds.data.corpus import prepare_corpus
        from incr_ds.data.selection import CorpusRequest
    chosen = {} if pattern is None else {"patterns": tuple(pattern.split(","))}
    request = CorpusRequest(
        inputs=tuple(input),
        tokenizer=tokenizer,
        output=output,
        vocabulary_size=vocab_size,
        held_out=held_out,
        text_key=text_key,
        append_eos=append_eos,
        eos_token=eos_token,
        max_bytes=max_bytes,
        workers=len(os.sched_getaffinity(0)) if workers is None else workers,
        overwrite=overwrite,
        trust=trust,
        **chosen,
    )
    with progress_bar(quiet=json) as progress:
        facts = prepare_corpus(request, progress)
    if json:
        print_json(asdict(facts))
    else:
        _show(facts, output)


def _show(facts: CorpusFacts, output: Path) -> None:
    for split, counts in facts.splits.items():
        console.print(
            f"{split}: {counts.documents:,} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens; "
            f"{counts.bytes_per_token:.2f} bytes per token; longest document {counts.longest_document:,} tokens"
        )
    if facts.left_out_files:
        console.print(f"left out by --max-bytes: {facts.left_out_files:,} files, {facts.left_out_bytes:,} bytes")
    if facts.not_text:
        console.print(f"skipped, not UTF-8: {len(facts.not_text)} file(s), listed in {output}_facts.json")
    console.print(f"wrote {output}_*: {facts.vocabulary_size} pieces, tokenizer {facts.tokenizer}")
