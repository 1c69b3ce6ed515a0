"""What every command line shares: exit codes, console, progress that is plain when not on a terminal."""

from __future__ import annotations

import functools
import gc
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from incr_ds.errors import IncrError

USER_MISTAKE = 2

PLAIN_WIDTH = 140  # where there is no terminal to ask: a log file keeps tables whole


def _console(*, stderr: bool = False) -> Console:
    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = PLAIN_WIDTH
    return made


console = _console()
errors = _console(stderr=True)


def command(function: Callable[..., None]) -> Callable[[], None]:
    """Make a program of a typer function: an IncrError prints its text and exits with 2, without a traceback."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)

    @functools.wraps(function)
    def program() -> None:
        gc.freeze()  # what is imported and planned stays; to look through it all once more at the end takes half a second
        try:
            app()
        except IncrError as error:
            errors.print(f"error: {error}", markup=False)
            sys.exit(USER_MISTAKE)
        finally:
            gc.freeze()

    return program


@contextmanager
def loading() -> Iterator[None]:
    """Import in this block what a command needs for its work, so that --help and a wrong option need not wait for torch.

    Imports make objects that stay: to look for garbage among them takes an eighth of torch's two seconds.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output."""
    typer.echo(json.dumps(content, indent=1, sort_keys=True, default=str))


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield report(phase, done, total): a bar on a terminal, one plain line per finished phase elsewhere."""
    if quiet:
        yield None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as bar:
            tasks: dict[str, Any] = {}

            def report(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bar.add_task(phase, total=total)
                bar.update(tasks[phase], completed=done)

            yield report
    else:
        yield _plain_line


def _plain_line(phase: str, done: int, total: int) -> None:
    if done == total:
        console.print(f"{phase}: {total} of {total}")
