"""The report of a study: a figure, and one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.publish import write_atomically
from incr_ds.study.comparison import Curve, Study, table_rows

COLOURS = {"source": "#7f7f7f", "grown": "#d62728", "scratch": "#1f77b4"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td { border-top: 1px solid #ccc; padding: .3rem 1rem .3rem 0 }
img { max-width: 100% } pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; white-space: pre-wrap }
"""


def draw_study(study: Study, path: Path) -> None:
    """Draw the held-out loss over tokens and over FLOPs, with the growth marked, as a PNG.

    On the left every run counts its own tokens, the grown run after the source's. On the right the grown run is drawn
    twice: with the source's FLOPs counted (solid) and sunk (dashed).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    source_end = study.source.last
    for curve in (study.source, study.grown, study.scratch):
        before = source_end if curve.run == "grown" else None
        _plot(left, curve, [p.tokens + (before.tokens if before else 0) for p in curve.points])
        _plot(right, curve, [p.flops + (before.flops if before else 0.0) for p in curve.points])
    sunk = [point.flops for point in study.grown.points]
    _plot(right, study.grown, sunk, label="grown, source sunk", linestyle="--")
    for axes, boundary in ((left, float(source_end.tokens)), (right, source_end.flops)):
        axes.axvline(boundary, color="#999999", linestyle=":", linewidth=1)
        axes.annotate(
            "growth", (boundary, 1.0), xycoords=("data", "axes fraction"), va="top", color="#666666", fontsize=9
        )
        axes.axhline(study.scratch.last.loss, color=COLOURS["scratch"], linewidth=0.6, alpha=0.6)
        axes.grid(alpha=0.25)
        axes.legend()
    left.set(xlabel="training tokens", ylabel="held-out loss (nats per token)")
    right.set(xlabel="training FLOPs (teacher included)")
    figure.savefig(path, dpi=130)


def write_report(study: Study, figure: Path, path: Path, facts: Mapping[str, Any], sample: str | None = None) -> None:
    """Write one self-contained HTML page. ``facts`` are JSON contents by title (sizes, recipe, proof of the growth)."""
    rows = "\n".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in table_rows(study))
    image = base64.b64encode(figure.read_bytes()).decode("ascii")
    parts = [
        "<h1>Growth against training from scratch</h1>",
        f"<table>\n{rows}\n</table>",
        f'<img alt="held-out loss over tokens and FLOPs" src="data:image/png;base64,{image}">',
        *(f"<h2>{html.escape(title)}</h2>\n<pre>{_as_text(content)}</pre>" for title, content in facts.items()),
    ]
    if sample:
        parts.append(f"<h2>Text of the grown model</h2>\n<pre>{html.escape(sample)}</pre>")
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Growth</title><style>{STYLE}</style></head>\n'
    write_atomically(path, f"{page}<body>\n{body}\n</body></html>\n")


def _plot(axes: Any, curve: Curve, horizontal: list[float], label: str | None = None, linestyle: str = "-") -> None:
    losses = [point.loss for point in curve.points]
    axes.plot(
        horizontal, losses, linestyle, label=label or curve.run, color=COLOURS[curve.run], marker=".", markersize=4
    )


def _as_text(content: Any) -> str:
    return html.escape(content if isinstance(content, str) else json.dumps(content, indent=1, sort_keys=True))
