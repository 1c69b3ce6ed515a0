"""What all command lines share: exit codes, the console, and progress that is plain text without a terminal."""

from __future__ import annotations

import errno
import functools
import gc
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from incr_ds.errors import ConfigError, IncrError
from incr_ds.launch.packages import missing_package

USER_MISTAKE = 2

MOST_LINES, MOST_CHARACTERS = 40, 1000  # of an error
_CURES = {
    errno.ENOSPC: "free some space, or choose another output",
    errno.EDQUOT: "free some space, or choose another output",
    errno.EROFS: "choose an output elsewhere",
    errno.EACCES: "ask for access, or choose another",
    errno.ENOTDIR: "a part of that path is a file",
}
PLAIN_WIDTH = 140  # if there is no terminal to ask, so that a log file keeps tables whole


def _console(*, stderr: bool = False) -> Console:
    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = PLAIN_WIDTH
    return made


console = _console()
errors = _console(stderr=True)


def command(function: Callable[..., None]) -> Callable[[], None]:
    """Turn a typer function into a program.

    Errors that a user can cause (an IncrError, a disk or a file that fails, an invalid value of an option) are printed on one
    screen, without a traceback, and the program exits with code 2.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    @functools.wraps(function)
    def checked(**options: Any) -> None:
        _check_options(options)
        function(**options)

    @functools.wraps(function)
    def program() -> None:
        gc.freeze()  # imports and plans stay in memory; scanning them at the end takes half a second
        try:
            _check_arguments(sys.argv[1:])
            _check_repeats(sys.argv[1:], app)
            with _optional_packages():
                try:
                    app()
                finally:
                    sys.stdout.flush()  # may fail, for example on a full disk
        except (IncrError, OSError) as error:
            _forget_output()
            errors.print(f"error: {error_text(error)}", markup=False)
            sys.exit(USER_MISTAKE)
        finally:
            gc.freeze()

    return program


@contextmanager
def _optional_packages() -> Iterator[None]:
    """Raise ConfigError if an import needs an extra of setup.py. Any other missing package is a defect."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (missing := missing_package(error)) is None:
            raise
        raise missing from error


def error_text(error: IncrError | OSError) -> str:
    """The readable text of an error: one screen at most, without control characters for the terminal."""
    text = str(error) if isinstance(error, IncrError) else _of_the_system(error)
    lines = ["".join(one if one.isprintable() else repr(one)[1:-1] for one in line) for line in text.splitlines()]
    # Each line starts with a name, so that its end can be cut.
    kept = [_shortened(re.sub(r"\S{400,}", lambda name: _shortened(name[0], 200), line)) for line in lines[:MOST_LINES]]
    return "\n".join([*kept, f"... and {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else kept)


def _shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]} ... {len(text) - most // 2 * 2:,} characters ... {text[-(most // 2) :]}"


def _of_the_system(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    cure = _CURES.get(error.errno or 0)
    return f"{where}{error.strerror or error}{'' if cure is None else f'; {cure}'}"


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an empty argument, which usually comes from a variable that a script forgot to set."""
    for number, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if not argument or (name.startswith("--") and name != argument and not value):
            before = arguments[number - 1] if number and not argument else name
            raise ConfigError(f"{before or 'argument'}: expected a value, found nothing.")


def _check_repeats(arguments: Sequence[str], app: typer.Typer) -> None:
    """Raise ConfigError for an option that is given twice but takes one value, since the first would be lost silently."""
    taken = [argument.partition("=")[0] for argument in arguments]
    for option in typer.main.get_command(app).params:
        given = sum(taken.count(name) for name in option.opts)
        if option.param_type_name == "option" and not (option.multiple or option.is_flag) and given > 1:  # type: ignore[attr-defined]
            raise ConfigError(
                f"{option.opts[0]}: given {given} times; it takes one value. Repeat the command for each."
            )


def _check_options(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected a finite number.")


def _forget_output() -> None:
    """Discard buffered output. Python would write it again when it exits, which would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def loading() -> Iterator[None]:
    """Import in this block what a command needs for its work, so that --help and wrong options do not wait for torch.

    Imports create objects that stay. Searching them for garbage takes an eighth of torch's two seconds, so it is off here.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object to standard output. NaN and infinity become null, since JSON does not have them."""
    typer.echo(json.dumps(_finite(content), indent=1, sort_keys=True, default=str, allow_nan=False))


def _finite(content: Any) -> Any:
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


@contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None] | None]:
    """Yield report(phase, done, total): a bar on a terminal, one plain line per finished phase elsewhere."""
    if quiet:
        yield None
    elif console.is_terminal:
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        with Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times, console=console
        ) as bar:
            tasks: dict[str, Any] = {}

            def report(phase: str, done: int, total: int) -> None:
                if phase not in tasks:
                    tasks[phase] = bar.add_task(phase, total=total, completed=done)  # a resumed one begins late
                bar.update(tasks[phase], completed=done)

            yield report
    else:
        yield _plain_line


def _plain_line(phase: str, done: int, total: int) -> None:
    if done == total:
        console.print(f"{phase}: {total} of {total}")
