"""metrics.jsonl: the record of a run with one JSON object per line, from which curves, tables and reports are made."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.publish import write_atomically
from incr_ds.config.json_file import parse_json
from incr_ds.errors import CheckpointError

FILE = "metrics.jsonl"


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands after ``step`` optimizer steps of its schedule.

    ``consumed_samples`` and ``tokens`` count from step 0 of the schedule, like ``step``. ``flops`` are all that this run has
    spent, the teacher's included. ``stage`` is the number of times that its model has grown. ``skipped_steps`` counts the
    steps so far whose gradients were not finite.
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    stage: int = 0
    skipped_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class TrainRow:
    """One logged step: its own loss (not an average), and what rank 0 measured since the last logged step.

    ``divergence`` is the student's distance to the teacher in nats per token at ``temperature``, before its factors a T^2.
    None if the teacher was not asked (``alpha`` 0). ``tflops_per_rank`` is TFLOP/s of one process, and ``mfu`` their share of
    its device's peak, None if that is not known. ``data_seconds`` is the part of ``seconds`` (the steps' time) that waited for
    batches. ``save_seconds`` was spent on saving besides. Memory is in bytes. ``slowest_ratio`` is the time of the
    slowest rank's own work over the median rank's, None if it is not measured (train/skew.py). ``new_learning_rate`` is the
    rate of the layers that the newest growth added, None if they have no rate of their own. ``loss_scale`` is the factor of
    the loss in fp16, None otherwise. ``router_loss`` and ``expert_load`` are a mixture's: the mean router loss of its layers,
    without its factor, and the largest share of a layer's tokens that one expert got, relative to an even share.
    """

    loss: float
    ce: float
    divergence: float | None
    alpha: float
    temperature: float
    learning_rate: float
    new_learning_rate: float | None = None
    gradient_norm: float
    skipped: bool
    loss_scale: float | None = None
    router_loss: float | None = None
    expert_load: float | None = None
    tokens_per_second: float
    tflops_per_rank: float
    mfu: float | None
    seconds: float
    data_seconds: float
    save_seconds: float
    memory_bytes: int
    peak_memory_bytes: int
    slowest_rank: int | None = None
    slowest_ratio: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """What was measured on one held-out set. ``bits_per_byte`` is None if the bytes behind the tokens are not known.

    ``teacher_kl`` is KL(teacher || student) at temperature 1, None if no teacher was asked.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    teacher_kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """One held-out evaluation.

    If the run names its held-out sets, ``sets`` has each of them, and ``loss``, ``bits_per_byte`` and ``teacher_kl`` are
    their means.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    teacher_kl: float | None = None
    seconds: float
    sets: Mapping[str, HeldOut] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GrowthRow:
    """The model has grown by ``recipe``. It had ``parameters_before`` and has ``parameters``; building it took ``seconds``."""

    recipe: str
    parameters_before: int
    parameters: int
    function_preserving: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RollBackRow:
    """The run diverged at ``from_step``, went back to the row's step, and skips ``first_sample`` to ``last_sample``.

    ``number`` counts its roll-backs, this one included.
    """

    number: int
    from_step: int
    first_sample: int
    last_sample: int
    reason: str


Row = TrainRow | EvaluationRow | GrowthRow | RollBackRow
# What is measured on the machine, in which equal runs differ.
TIMINGS = (
    "tokens_per_second",
    "tflops_per_rank",
    "mfu",
    "seconds",
    "data_seconds",
    "save_seconds",
    "memory_bytes",
    "peak_memory_bytes",
    "slowest_rank",
    "slowest_ratio",
)
KINDS: dict[type, str] = {
    TrainRow: "train",
    EvaluationRow: "evaluation",
    GrowthRow: "growth",
    RollBackRow: "roll_back",
}
# Keys of every row, in files of any version; only training and evaluation have a loss.
_ROW: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "tokens": (int,),
    "flops": (float, int),
    "loss": (float, int, type(None)),
}


def row(position: Position, values: Row) -> dict[str, Any]:
    """The JSON object of a line. ``kind`` is one of KINDS. A number that is not finite becomes null.

    Only a run that names its held-out sets has the key ``sets``.
    """
    content = _strict({"kind": KINDS[type(values)], **asdict(position), **asdict(values)})
    return {key: value for key, value in content.items() if key != "sets" or value}


def _strict(content: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _strict(value)
        if isinstance(value, dict)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in content.items()
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read every row of a metrics file. An unfinished last line (of a killed run) is ignored; other damage is an error."""

    def refuse(damage: str) -> None:
        raise CheckpointError(damage)

    return list(_rows(path, refuse))


def read_damaged_metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Read the valid rows of a metrics file, and what is wrong with each of its other lines."""
    damages: list[str] = []
    return list(_rows(path, damages.append)), damages


def _rows(path: Path, on_damage: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: not a regular file; expected the metrics of a run.")
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):  # a run was killed while it wrote this line
                    return
                try:
                    yield _row(line.decode("utf-8", errors="replace"), f"{path}, line {number}")
                except CheckpointError as error:
                    on_damage(str(error))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); expected the metrics of a run.") from error


def _row(line: str, where: str) -> dict[str, Any]:
    # Older files contain NaN, which is not JSON.
    content = parse_json(line, CheckpointError, where, finite=False)
    if not isinstance(content, dict) or content.get("kind") not in KINDS.values():
        raise CheckpointError(
            f"{where}: not a valid row of metrics: expected an object whose kind is {', '.join(KINDS.values())}."
        )
    for key, kinds in _ROW.items():
        if key == "loss" and content["kind"] in (KINDS[GrowthRow], KINDS[RollBackRow]):
            continue
        if not isinstance(value := content.get(key), kinds) or isinstance(value, bool):
            raise CheckpointError(f"{where}: {key}: expected {kinds[0].__name__}, found {value!r}.")
    return content


def _is_before(content: dict[str, Any], position: Position, evaluated_step: int | None) -> bool:
    """Whether a row belongs to a run's way to ``position``. Files of older versions state no stage."""
    step, stage = content["step"], content.get("stage", 0)
    repeated = (
        content["kind"] == KINDS[EvaluationRow]
        and stage == position.stage
        and evaluated_step is not None
        and step > evaluated_step
    ) or (content["kind"] == KINDS[RollBackRow] and step == position.step)
    return bool(step <= position.step and stage <= position.stage and not repeated)


class MetricsFile:
    """Appends rows. Opening it drops the rows past ``resumed``, so that a resumed run leaves one clean curve."""

    def __init__(
        self,
        folder: Path,
        resumed: Position | None,
        say: Callable[[str], None] = print,
        *,
        evaluated_step: int | None = None,
    ) -> None:
        """``resumed``: the position that the run resumes from, or None for a new run (every old row is dropped).

        ``evaluated_step`` is the last step that it has evaluated, if that is known. A later evaluation is repeated.
        Damaged lines are reported through ``say`` and dropped, since they must not keep a run from resuming.
        """
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            found = _rows(self.path, lambda damage: say(f"dropped a damaged line: {damage}"))
            kept = [] if resumed is None else [item for item in found if _is_before(item, resumed, evaluated_step)]
            write_atomically(self.path, "".join(json.dumps(_strict(item)) + "\n" for item in kept))
        self._stream = open(self.path, "a", encoding="utf-8")

    def append(self, content: dict[str, Any]) -> None:
        """Write one row and flush it. Raises CheckpointError if it cannot be written."""
        try:
            self._stream.write(json.dumps(content, allow_nan=False) + "\n")
            self._stream.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: {error.strerror}: a row could not be written. Make room and start the run again; it resumes from "
                "its newest checkpoint."
            ) from error

    def close(self) -> None:
        """Close the file. A row that could not be written was already reported."""
        with suppress(OSError):
            self._stream.close()
