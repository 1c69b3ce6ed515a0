"""Evaluate a checkpoint: held-out loss, perplexity of text files, tasks of lm-evaluation-harness, gain from repetition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incr_ds.cli.command import command, console, loading, print_json, progress_bar
from incr_ds.cli.options import Config, Json, Tag, Trust
from incr_ds.errors import ConfigError
from incr_ds.launch.packages import require

if TYPE_CHECKING:
    from incr_ds.checkpoint.base import LogicalCheckpoint

Progress = Callable[[str, int, int], None] | None


class Device(StrEnum):
    """Where the model runs."""

    cpu = "cpu"
    cuda = "cuda"


@command
def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint, run, or Hugging Face folder.")],
    data: Annotated[str | None, typer.Option(help="Held-out Megatron data set: path without .bin.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text file, scored in whole. Repeatable.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness, zero-shot, like arc_easy,piqa. Needs the extra eval."),
    ] = None,
    task_files: Annotated[
        Path | None, typer.Option(help="Folder of your own task files; functions that they name will run.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: questions of each task.")] = None,
    repetition: Annotated[
        bool,
        typer.Option("--repetition", help="Whether it copies from its context: the gain on repeated random tokens."),
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer folder for --text, --tasks; default: FOLDER.")
    ] = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample, or per window of a text.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="With --data: samples to evaluate.")] = 64,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.cpu,
    tag: Tag = None,
    config: Config = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Print what FOLDER reaches on token data (--data), text files (--text), tasks (--tasks) and repetitions (--repetition)."""
    if data is None and not text and tasks is None and not repetition:
        raise ConfigError(
            "expected what to evaluate on: --data PREFIX, --text FILE, --tasks NAMES or --repetition, or several of them."
        )
    names = _checked_tasks(data, tasks, task_files, limit)
    with loading():
        from incr_ds.checkpoint.integrity import open_described
        from incr_ds.cli.run_folder import located
    place = located(folder)
    checkpoint = open_described(place, tag, config, trust=trust)
    found: dict[str, Any] = {}
    with progress_bar(quiet=json) as progress:
        if data is not None:
            found["data"] = _data_loss(checkpoint, data, sequence_length, samples, device, progress)
        if text:
            found["text"] = _text_losses(checkpoint, text, tokenizer or place, sequence_length, device, progress)
        if repetition:
            found["repetition_gain"] = _repetition_gain(checkpoint, sequence_length, device)
        if names:
            found["tasks"] = _task_metrics(checkpoint, names, task_files, limit, tokenizer or place, device)
    if json:
        # One kind alone keeps the form that it has had: the numbers themselves.
        print_json(found["data"] if list(found) == ["data"] else found)
    else:
        for line in _lines(found):
            console.print(line, markup=False)


def _checked_tasks(data: str | None, tasks: str | None, task_files: Path | None, limit: int | None) -> list[str]:
    """The names of the tasks. Raises ConfigError for options that have no effect or need a package."""
    if tasks is None and (task_files is not None or limit is not None):
        raise ConfigError(
            f"{'--limit' if task_files is None else '--task-files'}: without effect; it belongs to --tasks."
        )
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise ConfigError(f"--tasks {tasks}: expected names with commas between them, such as arc_easy,piqa.")
    needed = [*(["megatron.core"] if data is not None else []), *(["lm_eval"] if names else [])]
    require(*needed)
    return names


def _data_loss(
    checkpoint: LogicalCheckpoint, data: str, length: int, samples: int, device: str, progress: Progress
) -> dict[str, Any]:
    with loading():
        from incr_ds.train.evaluation import evaluate_checkpoint
    return asdict(evaluate_checkpoint(checkpoint, data, length, samples, device=device, progress=progress))


def _text_losses(
    checkpoint: LogicalCheckpoint, files: list[Path], tokenizer: Path, length: int, device: str, progress: Progress
) -> dict[str, Any]:
    with loading():
        from incr_ds.offline.text_loss import evaluate_text
    return {
        str(file): asdict(evaluate_text(checkpoint, tokenizer, file, length, device=device, progress=progress))
        for file in files
    }


def _repetition_gain(checkpoint: LogicalCheckpoint, length: int, device: str) -> float:
    with loading():
        from incr_ds.offline.repetition import checkpoint_repetition_gain
    return checkpoint_repetition_gain(checkpoint, length, device=device)


def _task_metrics(
    checkpoint: LogicalCheckpoint,
    names: list[str],
    task_files: Path | None,
    limit: int | None,
    tokenizer: Path,
    device: str,
) -> dict[str, Any]:
    with loading():
        from incr_ds.offline.tasks import evaluate_tasks
    return evaluate_tasks(checkpoint, tokenizer, names, task_files, limit=limit, device=device)


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [_loss_line(found["data"])] if "data" in found else []
    for file, loss in found.get("text", {}).items():
        unknown = f" ({loss['unknown_tokens']:,} unknown tokens)" if loss["unknown_tokens"] else ""
        lines.append(f"{file}: {_loss_line(loss)}{unknown}")
    if "repetition_gain" in found:
        lines.append(f"repetition gain {found['repetition_gain']:.4f} nats per token")
    for name, metrics in found.get("tasks", {}).items():
        lines.append(f"{name}, zero-shot: {', '.join(f'{key} {value:.4f}' for key, value in metrics.items())}")
    return lines


def _loss_line(found: dict[str, Any]) -> str:
    bits = "" if found["bits_per_byte"] is None else f", {found['bits_per_byte']:.4f} bits per byte"
    return f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}{bits} over {found['tokens']:,} tokens"
