"""Figures of every report: one way to open, colour and store them. matplotlib is loaded only when one is drawn."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from io import BytesIO
from typing import Any


def new_figure(width: float, height: float, columns: int = 1, **shared: Any) -> tuple[Any, Any]:
    """A figure of ``width`` x ``height`` inches and its row of ``columns`` axes. ``shared`` are options of ``subplots``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **shared)[0]
    for one in axes:
        one.grid(alpha=0.25)
    return figure, axes


def colours(names: Iterable[str], palette: str = "tab20") -> dict[str, Any]:
    """A colour for each name, in their order."""
    from matplotlib import colormaps

    known = colormaps[palette].colors  # type: ignore[attr-defined]
    return {name: known[number % len(known)] for number, name in enumerate(names)}


def label(text: str, most: int = 40) -> str:
    """Text of a file as matplotlib shows it: not as a formula, not hidden, and not longer than the figure."""
    plain = "".join(one if one.isprintable() else "?" for one in text)
    short = plain if len(plain) <= most else f"{plain[: most // 2]}...{plain[-most // 2 :]}"
    return short.replace("$", r"\$").lstrip("_") or "unnamed"


def mark(axes: Any, where: float, text: str) -> None:
    """A dotted vertical line, with its label at the top."""
    axes.axvline(where, color="#999999", linestyle=":", linewidth=1)
    axes.annotate(text, (where, 1.0), xycoords=("data", "axes fraction"), va="top", color="#666666", fontsize=9)


def png_of(figure: Any, dpi: int = 110) -> bytes:
    """The figure as PNG."""
    stream = BytesIO()
    with warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the page around the figure has it as text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="png", dpi=dpi)
    return stream.getvalue()
