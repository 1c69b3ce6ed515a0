"""Write text for a growth study: the code of the installed Python packages, and the prose of their docstrings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json


@command
def main(
    output: Annotated[Path, typer.Option(help="Folder for code.jsonl and prose.jsonl.")],
    max_bytes: Annotated[int, typer.Option(min=1, help="At most this much text of each kind.")] = 60_000_000,
    packages: Annotated[
        Path | None, typer.Option(help="Folder of .py files (default: this Python's site-packages).")
    ] = None,
    json: Json = False,
) -> None:
    """Write the text of the growth study. With the versions of constraints.txt it is the same on every machine."""
    from incr_ds.study.text import write_texts

    facts = write_texts(output, max_bytes, packages)
    if json:
        print_json({item.path.name: {"documents": item.documents, "bytes": item.bytes} for item in facts})
        return
    for item in facts:
        console.print(f"wrote {item.path}: {item.documents:,} documents, {item.bytes:,} bytes")
