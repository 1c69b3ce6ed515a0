"""Computes the numbers of a study from the curves of a source, a grown and a from-scratch run.

Everything comes from metrics.jsonl. FLOPs are those that the runs recorded, the teacher's included. The source's own
pre-training is reported twice, counted and sunk. A loss counts as reached at the first held-out evaluation at or below
it, without interpolation, so a saving is never overstated by more than one evaluation interval.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.publish import write_atomically
from incr_ds.errors import CheckpointError
from incr_ds.train.metrics import FILE, read_metrics

RUNS = ("source", "grown", "scratch")


@dataclass(frozen=True)
class Evaluation:
    """One held-out evaluation: optimizer steps, tokens and FLOPs of its run so far, and the loss in nats per token."""

    step: int
    tokens: int
    flops: float
    loss: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class Curve:
    """The held-out evaluations of one run, in order of steps."""

    run: str
    points: tuple[Evaluation, ...]

    @property
    def last(self) -> Evaluation:
        """The final evaluation."""
        return self.points[-1]


@dataclass(frozen=True)
class Saving:
    """Where the grown run first reaches the scratch run's final loss, and which share of its FLOPs is saved.

    ``sunk`` ignores the source's pre-training; ``counted`` adds it to the grown run. Negative means more FLOPs.
    """

    point: Evaluation
    sunk: float
    counted: float


@dataclass(frozen=True)
class Study:
    """Three curves, their held-out losses at equal steps (step, grown, scratch), and the saving.

    ``saving`` is None if the grown run never reaches the scratch run's final loss.
    """

    source: Curve
    grown: Curve
    scratch: Curve
    equal_steps: tuple[tuple[int, float, float], ...]
    saving: Saving | None


def read_curve(run: str, folder: Path) -> Curve:
    """The held-out evaluations of the run in ``folder``. Raises CheckpointError if it has none."""
    rows = [item for item in read_metrics(folder / FILE) if item["kind"] == "evaluation"]
    if not rows:
        raise CheckpointError(f"{folder / FILE}: no held-out evaluation; the run file needs the key evaluation.")
    points = (Evaluation(r["step"], r["tokens"], r["flops"], r["loss"], r["bits_per_byte"]) for r in rows)
    return Curve(run, tuple(sorted(points, key=lambda point: point.step)))


def compare_curves(source: Curve, grown: Curve, scratch: Curve) -> Study:
    """Compute the numbers of a study."""
    of_scratch = {point.step: point.loss for point in scratch.points}
    equal = tuple(
        (point.step, point.loss, of_scratch[point.step]) for point in grown.points if point.step in of_scratch
    )
    return Study(source, grown, scratch, equal, _saving(source, grown, scratch))


def first_at_or_below(curve: Curve, loss: float) -> Evaluation | None:
    """The first evaluation of ``curve`` with a loss of at most ``loss``."""
    return next((point for point in curve.points if point.loss <= loss), None)


def summary(study: Study) -> dict[str, Any]:
    """The numbers of a study as JSON content."""
    saving = study.saving
    return {
        "held_out_loss": {curve.run: curve.last.loss for curve in (study.source, study.grown, study.scratch)},
        "bits_per_byte": {curve.run: curve.last.bits_per_byte for curve in (study.source, study.grown, study.scratch)},
        "flops": {curve.run: curve.last.flops for curve in (study.source, study.grown, study.scratch)},
        "flops_grown_with_source": study.grown.last.flops + study.source.last.flops,
        "equal_steps": [dict(zip(("step", "grown", "scratch"), item, strict=True)) for item in study.equal_steps],
        "scratch_loss_reached": None
        if saving is None
        else {
            **asdict(saving.point),
            "flops_saved_source_sunk": saving.sunk,
            "flops_saved_source_counted": saving.counted,
        },
    }


def merge_metrics(folders: Mapping[str, Path], output: Path) -> None:
    """Write the rows of several runs as one metrics.jsonl, each with its ``run``."""
    lines = [
        json.dumps({"run": run, **item}) for run, folder in folders.items() for item in read_metrics(folder / FILE)
    ]
    write_atomically(output, "\n".join(lines) + "\n")


def table_rows(study: Study) -> Sequence[tuple[str, str]]:
    """The study in a few labelled lines, for the console and the report."""
    rows = [
        (f"held-out loss, step {step}", f"grown {grown:.4f}   scratch {scratch:.4f}")
        for step, grown, scratch in thinned(study.equal_steps)
    ]
    source, grown, scratch = study.source.last, study.grown.last, study.scratch.last
    rows.append(("source, final held-out loss", f"{source.loss:.4f} after {source.step} steps"))
    if None not in (source.bits_per_byte, grown.bits_per_byte, scratch.bits_per_byte):
        bits = (
            f"source {source.bits_per_byte:.4f}   grown {grown.bits_per_byte:.4f}   scratch {scratch.bits_per_byte:.4f}"
        )
        rows.append(("bits per byte, final", bits))
    total = grown.flops + source.flops
    rows += [
        ("in one sentence", _in_one_sentence(source, grown, scratch)),
        ("FLOPs, scratch", f"{scratch.flops:.3e}"),
        ("FLOPs, grown (teacher counted)", f"{grown.flops:.3e}; with the source's {total:.3e}"),
        ("scratch's final loss", _reached_text(study.saving)),
    ]
    return rows


def thinned(rows: Sequence[Any], most: int = 5) -> list[Any]:
    """At most ``most`` rows, evenly spaced, with the first and the last."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(index * (len(rows) - 1) / (most - 1))] for index in range(most)]


def _saving(source: Curve, grown: Curve, scratch: Curve) -> Saving | None:
    point = first_at_or_below(grown, scratch.last.loss)
    if point is None:
        return None
    spent, whole = point.flops, scratch.last.flops
    return Saving(point, 1.0 - spent / whole, 1.0 - (spent + source.last.flops) / whole)


def _in_one_sentence(source: Evaluation, grown: Evaluation, scratch: Evaluation) -> str:
    """Both accountings of the cost, for a reader who knows neither."""
    total, lower = grown.flops + source.flops, "lower" if grown.loss < scratch.loss else "higher"
    equal = abs(total / scratch.flops - 1.0) < 0.01
    spent = "the same FLOPs" if equal else f"{total / scratch.flops:.2f} times the FLOPs"
    return (
        f"for {spent} as training from scratch, training the small model and growing it gives a loss that is "
        f"{abs(grown.loss - scratch.loss):.3f} {lower} ({grown.loss:.3f} against {scratch.loss:.3f}); if the small model exists "
        f"anyway, it is {grown.flops / scratch.flops:.2f} times the FLOPs"
    )


def _reached_text(saving: Saving | None) -> str:
    if saving is None:
        return "not reached by the grown model"
    return (
        f"reached by the grown model at step {saving.point.step}: FLOPs saved {saving.sunk:.0%} with the source's sunk, "
        f"{saving.counted:.0%} with them counted"
    )
