"""What a run shows: metrics.jsonl, boards and the console. Only rank 0 has a monitor; other ranks are silent."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from incr_ds.config.training import WandbSettings
from incr_ds.train.boards import Board, TensorBoard, WandbBoard
from incr_ds.train.metrics import EvaluationRow, GrowthRow, MetricsFile, Position, RollBackRow, Row, TrainRow, row


class Monitor(Protocol):
    """Receives the rows of a run."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def record(self, position: Position, values: Row) -> None:
        """Store and show one row."""
        ...

    def rewind(self, position: Position, evaluated_step: int) -> None:
        """Drop what was recorded after ``position``, and evaluations after ``evaluated_step``."""
        ...

    def say(self, text: str) -> None:
        """Show one line."""
        ...


class Silence:
    """The monitor of all ranks except rank 0."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def record(self, position: Position, values: Row) -> None:
        """Nothing."""

    def rewind(self, position: Position, evaluated_step: int) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""


class RunMonitor:
    """Writes metrics.jsonl, and what the run file asks for: TensorBoard, Weights & Biases.

    Shows a progress bar on a terminal, otherwise plain lines.
    """

    def __init__(
        self,
        output: Path,
        *,
        resumed: Position | None,
        train_steps: int,
        tensorboard: bool,
        evaluated_step: int | None = None,
        wandb: WandbSettings | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """``resumed`` and ``evaluated_step`` are as in MetricsFile; ``config`` is the run file's content, for the board."""
        self._console = Console(soft_wrap=True, highlight=False)
        self._output = output
        resumed_step = None if resumed is None else resumed.step
        self._progress = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._train_steps = train_steps
        self._task = self._progress.add_task("", total=train_steps, completed=resumed_step or 0)
        self._boards: list[Board] = []
        if wandb is not None:  # first, since it may refuse, and no file is open yet
            self._boards.append(WandbBoard(output, wandb, config or {}, resumes=resumed is not None, say=self.say))
        if tensorboard:
            self._boards.append(TensorBoard(output / "tensorboard", resumed_step))
        self._open(resumed, evaluated_step)

    def _open(self, resumed: Position | None, evaluated_step: int | None) -> None:
        self._metrics = MetricsFile(
            self._output, resumed, lambda text: self._console.print(text, markup=False), evaluated_step=evaluated_step
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._metrics.close()
        for board in self._boards:
            board.close(failed=error is not None)

    def rewind(self, position: Position, evaluated_step: int) -> None:
        """Drop what was recorded after ``position``, and evaluations after ``evaluated_step``."""
        self._metrics.close()
        self._open(position, evaluated_step)
        for board in self._boards:
            board.rewind(position.step)

    def record(self, position: Position, values: Row) -> None:
        """Store and show one row."""
        content = row(position, values)
        self._metrics.append(content)
        for board in self._boards:
            board.write(content)
        if isinstance(values, TrainRow):
            self._progress.update(self._task, completed=position.step, description=f"loss {values.loss:.4f}")
        self.say(f"step {position.step:>{len(str(self._train_steps))}}/{self._train_steps}  {_line(values)}")

    def say(self, text: str) -> None:
        """Show one line, above the bar if there is one. If the reader of a pipe is gone, the run continues in silence."""
        try:
            self._progress.console.print(text, markup=False)
        except BrokenPipeError:
            sys.stdout = self._console.file = open(os.devnull, "w", encoding="utf-8")


def _line(values: Row) -> str:
    match values:
        case TrainRow():
            return _train_line(values)
        case EvaluationRow():
            return _held_out_line(values)
        case GrowthRow():
            return _growth_line(values)
        case RollBackRow():
            return _roll_back_line(values)


def _train_line(values: TrainRow) -> str:
    taught = f" (ce {values.ce:.4f}, kl {values.divergence:.4f}, a {values.alpha:.3f})" if values.alpha else ""
    routed = ""
    if values.router_loss is not None:
        routed = f"  router {values.router_loss:.3f}, largest expert x {values.expert_load:.2f}"
    mfu = "" if values.mfu is None else f"  mfu {values.mfu:.1%}"
    return (
        f"loss {values.loss:.4f}{taught}  lr {values.learning_rate:.2e}  |g| {values.gradient_norm:.3f}{routed}  "
        f"{values.tokens_per_second:,.0f} tokens/s{mfu}{'  SKIPPED' if values.skipped else ''}"
    )


def _held_out_line(values: EvaluationRow) -> str:
    bits = "" if values.bits_per_byte is None else f"  {values.bits_per_byte:.4f} bits/byte"
    sets = ", ".join(f"{name} {found.loss:.4f}" for name, found in values.sets.items())
    distance = "" if values.teacher_kl is None else f"  kl from the teacher {values.teacher_kl:.4f}"
    named = f" ({sets})" if sets else ""
    return f"held-out loss {values.loss:.4f}{named}  perplexity {values.perplexity:.2f}{bits}{distance}"


def _roll_back_line(values: RollBackRow) -> str:
    return (
        f"went back from step {values.from_step} and skips samples {values.first_sample} to {values.last_sample} "
        f"(roll-back {values.number}): {values.reason}"
    )


def _growth_line(values: GrowthRow) -> str:
    keeps = "keeps" if values.function_preserving else "does not keep"
    return (
        f"grown from {values.parameters_before:,} to {values.parameters:,} parameters by {values.recipe}, which {keeps} the "
        f"function, in {values.seconds:.1f} s"
    )
