"""The report of a study: a figure, and one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.publish import write_atomically
from incr_ds.report.drawing import mark, new_figure, png_of
from incr_ds.report.page import document, heading, picture, preformatted, table
from incr_ds.study.comparison import Curve, Study, table_rows

COLOURS = {"source": "#7f7f7f", "grown": "#d62728", "scratch": "#1f77b4"}


def draw_study(study: Study, path: Path) -> None:
    """Draw the held-out loss over tokens and over FLOPs, with the growth marked, as a PNG.

    On the left every run counts its own tokens, the grown run after the source's. On the right the grown run is drawn
    twice: with the source's FLOPs counted (solid) and sunk (dashed).
    """
    figure, (left, right) = new_figure(11, 4.5, 2, sharey=True)
    source_end = study.source.last
    for curve in (study.source, study.grown, study.scratch):
        before = source_end if curve.run == "grown" else None
        _plot(left, curve, [p.tokens + (before.tokens if before else 0) for p in curve.points])
        _plot(right, curve, [p.flops + (before.flops if before else 0.0) for p in curve.points])
    sunk = [point.flops for point in study.grown.points]
    _plot(right, study.grown, sunk, label="grown, source sunk", linestyle="--")
    for axes, boundary in ((left, float(source_end.tokens)), (right, source_end.flops)):
        mark(axes, boundary, "growth")
        axes.axhline(study.scratch.last.loss, color=COLOURS["scratch"], linewidth=0.6, alpha=0.6)
        axes.legend()
    left.set(xlabel="training tokens", ylabel="held-out loss (nats per token)")
    right.set(xlabel="training FLOPs (teacher included)")
    path.write_bytes(png_of(figure, dpi=130))


def write_report(study: Study, figure: Path, path: Path, facts: Mapping[str, Any], sample: str | None = None) -> None:
    """Write one self-contained HTML page. ``facts`` are JSON contents by title (sizes, recipe, proof of the growth)."""
    parts = [
        heading("Growth against training from scratch", 1),
        table(table_rows(study)),
        picture("held-out loss over tokens and FLOPs", figure.read_bytes()),
    ]
    texts = {**facts, **({"Text of the grown model": sample} if sample else {})}
    for title, content in texts.items():
        parts += [heading(title), preformatted(content)]
    write_atomically(path, document("Growth", parts))


def _plot(axes: Any, curve: Curve, horizontal: list[float], label: str | None = None, linestyle: str = "-") -> None:
    losses = [point.loss for point in curve.points]
    axes.plot(
        horizontal, losses, linestyle, label=label or curve.run, color=COLOURS[curve.run], marker=".", markersize=4
    )
