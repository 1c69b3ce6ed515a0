"""Options that several commands have, stated once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Tag = Annotated[str | None, typer.Option(help="DeepSpeed tag; default: what `latest` names.")]
Config = Annotated[Path | None, typer.Option(help="Hugging Face config.json, if not in the folder.")]
Trust = Annotated[bool, typer.Option("--trust", help="Let pickles in the checkpoint run code.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON only.")]
