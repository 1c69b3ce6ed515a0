"""What a run shows: metrics.jsonl, tensorboard and the console. Only rank 0 has a monitor; other ranks are silent."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
    """Writes metrics.jsonl, and tensorboard if wanted. Shows a progress bar on a terminal, otherwise plain lines."""

    def __init__(
        self,
        output: Path,
        *,
        resumed: Position | None,
        train_steps: int,
        tensorboard: bool,
        evaluated_step: int | None = None,
    ) -> None:
        self._console = Console(soft_wrap=True, highlight=False)
        self._output, self._tensorboard = output, tensorboard
        self._open(resumed, evaluated_step)
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
        self._task = self._progress.add_task("", total=train_steps, completed=0 if resumed is None else resumed.step)

    def _open(self, resumed: Position | None, evaluated_step: int | None) -> None:
        self._metrics = MetricsFile(
            self._output, resumed, lambda text: self._console.print(text, markup=False), evaluated_step=evaluated_step
        )
        step = None if resumed is None else resumed.step
        self._board = _open_board(self._output / "tensorboard", step) if self._tensorboard else None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._close()

    def _close(self) -> None:
        self._metrics.close()
        if self._board is not None:
            self._board.close()

    def rewind(self, position: Position, evaluated_step: int) -> None:
        """Drop what was recorded after ``position``, and evaluations after ``evaluated_step``."""
        self._close()
        self._open(position, evaluated_step)

    def record(self, position: Position, values: Row) -> None:
        """Store and show one row."""
        content = row(position, values)
        self._metrics.append(content)
        if self._board is not None:
            _write_board(self._board, content)
        if isinstance(values, TrainRow):
            self._progress.update(self._task, completed=position.step, description=f"loss {values.loss:.4f}")
        self.say(f"step {position.step:>{len(str(self._train_steps))}}/{self._train_steps}  {_line(values)}")

    def say(self, text: str) -> None:
        """Show one line, above the bar if there is one. If the reader of a pipe is gone, the run continues in silence."""
        try:
            self._progress.console.print(text, markup=False)
        except BrokenPipeError:
            sys.stdout = self._console.file = open(os.devnull, "w", encoding="utf-8")


def _open_board(folder: Path, resumed_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=None if resumed_step is None else resumed_step + 1)


def _write_board(board: Any, content: dict[str, Any]) -> None:
    for name, value in content.items():
        if isinstance(value, str) and name != "kind":
            board.add_text(f"{content['kind']}/{name}", value, content["step"])
        elif name not in ("kind", "step") and value is not None:
            board.add_scalar(f"{content['kind']}/{name}", value, content["step"])


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
    mfu = "" if values.mfu is None else f"  mfu {values.mfu:.1%}"
    return (
        f"loss {values.loss:.4f}{taught}  lr {values.learning_rate:.2e}  |g| {values.gradient_norm:.3f}  "
        f"{values.tokens_per_second:,.0f} tokens/s{mfu}{'  SKIPPED' if values.skipped else ''}"
    )


def _held_out_line(values: EvaluationRow) -> str:
    bits = "" if values.bits_per_byte is None else f"  {values.bits_per_byte:.4f} bits/byte"
    return f"held-out loss {values.loss:.4f}  perplexity {values.perplexity:.2f}{bits}"


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
