"""Make Megatron .bin/.idx data sets, and optionally a tokenizer, from text files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from incr_ds.cli.command import command, console, loading, print_json, progress_bar
from incr_ds.cli.options import Json
from incr_ds.launch.packages import require

if TYPE_CHECKING:
    from incr_ds.data.corpus import CorpusFacts


@command
def main(
    input: Annotated[list[Path], typer.Option("--input", help="Folder or file; repeatable.")],
    tokenizer: Annotated[str, typer.Option(help="A transformers tokenizer folder, or train:sentencepiece.")],
    output: Annotated[Path, typer.Option(help="PREFIX of every file written.")],
    vocab_size: Annotated[int, typer.Option(help="Vocabulary size of a trained tokenizer.")] = 4096,
    held_out: Annotated[float, typer.Option(help="Fraction of the documents kept for validation.")] = 0.05,
    pattern: Annotated[str, typer.Option(help="File names to read in folders, comma separated.")] = (
        "*.py,*.txt,*.md,*.jsonl"
    ),
    max_bytes: Annotated[int | None, typer.Option(help="Read at most this much text.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")] = False,
    trust: Annotated[bool, typer.Option("--trust", help="Let the tokenizer folder run its own code.")] = False,
    json: Json = False,
) -> None:
    """Tokenize text. A file is one document; in .jsonl files each line is one (key text). Equal documents share a split."""
    require("megatron.core")
    with loading():
        from incr_ds.data.corpus import CorpusRequest, prepare_corpus
    request = CorpusRequest(
        inputs=tuple(input),
        tokenizer=tokenizer,
        output=output,
        vocabulary_size=vocab_size,
        held_out=held_out,
        patterns=tuple(pattern.split(",")),
        max_bytes=max_bytes,
        overwrite=overwrite,
        trust=trust,
    )
    with progress_bar(quiet=json) as progress:
        facts = prepare_corpus(request, progress)
    if json:
        print_json(asdict(facts))
    else:
        _show(facts, output)


def _show(facts: CorpusFacts, output: Path) -> None:
    for split, counts in facts.splits.items():
        console.print(f"{split}: {counts.documents:,} documents, {counts.bytes:,} bytes, {counts.tokens:,} tokens")
    if facts.left_out_files:
        console.print(f"left out by --max-bytes: {facts.left_out_files:,} files, {facts.left_out_bytes:,} bytes")
    if facts.not_text:
        console.print(f"skipped, not UTF-8: {len(facts.not_text)} file(s), listed in {output}_facts.json")
    console.print(f"wrote {output}_*: {facts.vocabulary_size} pieces, tokenizer {facts.tokenizer}")
