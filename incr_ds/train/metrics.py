"""metrics.jsonl: the record of a run, one JSON object a line, from which curves, tables and reports are made."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from incr_ds.errors import CheckpointError
from incr_ds.target.commit import write_atomically

FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after ``step`` optimizer steps.

    ``consumed_samples`` counts from the run's own start; ``flops`` is what the run has spent, the teacher included.
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    flops: float = 0.0


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One logged step: its own loss (not an average), and speed since the last logged step."""

    loss: float
    ce: float
    divergence: float
    alpha: float
    temperature: float
    learning_rate: float
    gradient_norm: float
    skipped: bool
    tokens_per_second: float
    mfu: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One held-out evaluation; ``bits_per_byte`` is None where the bytes behind the tokens are not known."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    seconds: float


TIMINGS = ("tokens_per_second", "mfu", "seconds")
KINDS: dict[type, str] = {TrainRow: "train", EvaluationRow: "evaluation"}


def row(position: Position, values: TrainRow | EvaluationRow) -> dict[str, Any]:
    """The JSON object of a line; ``kind`` is train or evaluation."""
    return {"kind": KINDS[type(values)], **asdict(position), **asdict(values)}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every row of a metrics file. A last line without an end (a killed run) is not a row; other damage is an error."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); expected the metrics of a run.") from error
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number}: not a JSON object: {error}") from error
    return rows


class MetricsFile:
    """Appends rows; at opening, the rows past ``step`` are dropped, so a resumed run leaves one clean curve."""

    def __init__(self, folder: Path, step: int | None) -> None:
        """``step``: the step that the run resumes from; None for a run that starts now (every old row is dropped)."""
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [] if step is None else [item for item in read_metrics(self.path) if item["step"] <= step]
            write_atomically(self.path, "".join(json.dumps(item) + "\n" for item in kept))
        self._stream = open(self.path, "a", encoding="utf-8")

    def append(self, content: dict[str, Any]) -> None:
        """Write one row; it is in the file when this returns."""
        self._stream.write(json.dumps(content) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
