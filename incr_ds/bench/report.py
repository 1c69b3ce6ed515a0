"""Reports measurements as JSON, as a table and as a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from incr_ds.bench.measure import Measurement
from incr_ds.bench.results import ResultTable
from incr_ds.losses.planner import LossShape, plan_loss

COLOURS = {"floor": "#222222", "ours": "#d62728", "torch": "#1f77b4", "other": "#7f7f7f"}
HEADINGS = ("N", "V", "variant", "computes", "ms", "of the floor", "extra GB", "gradients GB")


def summarise(
    found: Sequence[Measurement], shapes: Sequence[LossShape], facts: Mapping[str, str], bandwidth: float
) -> dict[str, Any]:
    """All measurements, with the ceilings of the same run and the floating-point operations of each shape."""
    return {
        "machine": dict(facts),
        "copy_gigabytes_per_second": bandwidth,
        "shapes": [
            {
                "tokens": shape.tokens,
                "vocabulary": shape.vocabulary,
                "student_width": shape.student_width,
                "teacher_width": shape.teacher_width,
                "flops": plan_loss(shape, 2**40).flops,
                "floor_tflops": _floor_tflops(found, shape),
            }
            for shape in shapes
        ],
        "measurements": [asdict(measurement) for measurement in found],
    }


def result_table(found: Sequence[Measurement]) -> ResultTable:
    """The measurements. A missing number is replaced by its reason."""
    return ResultTable("the loss, forward and backward", HEADINGS, _rows(found))


def _rows(found: Sequence[Measurement]) -> list[tuple[str, ...]]:
    cells: list[tuple[str, ...]] = []
    for one in found:
        floor = _floor_milliseconds(found, one.tokens, one.vocabulary)
        start = (f"{one.tokens:,}", f"{one.vocabulary:,}", one.variant, one.computes)
        if one.milliseconds is None:
            cells.append((*start, one.absent or "", "", "", ""))
            continue
        share = "" if floor is None else f"{floor / one.milliseconds:.0%}"
        memory = [_gigabytes(count) for count in (one.extra_bytes, one.gradient_bytes)]
        cells.append((*start, f"{one.milliseconds:.2f}", share, *memory))
    return cells


def write_report(summary: Mapping[str, Any], found: Sequence[Measurement], folder: Path) -> list[Path]:
    """Write loss.json, loss.md, loss.svg and loss-scaling.svg to ``folder``, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in ("loss.json", "loss.md", "loss.svg", "loss-scaling.svg")]
    paths[0].write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    paths[1].write_text(_markdown(summary, found), encoding="utf-8")
    _draw_bars(found, paths[2])
    _draw_lines(found, paths[3])
    return paths


def _markdown(summary: Mapping[str, Any], found: Sequence[Measurement]) -> str:
    facts = ", ".join(f"{key} {value}" for key, value in summary["machine"].items())
    lines = [
        "# The loss, forward and backward",
        "",
        f"{facts}. Copies run at {summary['copy_gigabytes_per_second']:.0f} GB/s.",
        "Extra GB: peak memory beyond what was there before the pass and beyond the gradients that it hands out.",
        "",
        *result_table(found).markdown(),
    ]
    return "\n".join(lines) + "\n"


def _draw_bars(found: Sequence[Measurement], path: Path) -> None:
    """Draw bars of time per shape, with a line for the floor of the same run."""
    shapes = sorted({(one.tokens, one.vocabulary) for one in found})
    figure = _figure(8, 1.2 + 3.2 * len(shapes))
    for axes, (tokens, vocabulary) in zip(figure.subplots(len(shapes), 1, squeeze=False)[:, 0], shapes, strict=True):
        here = [one for one in found if (one.tokens, one.vocabulary) == (tokens, vocabulary)]
        timed = [one for one in here if one.milliseconds is not None][::-1]
        labels = [f"{one.variant} ({one.computes})" for one in timed]
        axes.barh(labels, [one.milliseconds for one in timed], color=[COLOURS[one.kind] for one in timed])
        floor = _floor_milliseconds(found, tokens, vocabulary)
        if floor is not None:
            axes.axvline(floor, color=COLOURS["floor"], linestyle=":", linewidth=1)
        axes.set(title=f"{tokens:,} tokens, {vocabulary:,} entries", xlabel="milliseconds, forward and backward")
    figure.savefig(path)


def _draw_lines(found: Sequence[Measurement], path: Path) -> None:
    """Draw time and extra memory over the number of tokens, per vocabulary."""
    sizes = sorted({one.vocabulary for one in found})
    figure = _figure(13, 1.0 + 4.0 * len(sizes))
    grid = figure.subplots(len(sizes), 2, squeeze=False)
    for (time, memory), vocabulary in zip(grid, sizes, strict=True):
        for name, kind in dict.fromkeys((one.variant, one.kind) for one in found):
            here = [one for one in found if (one.variant, one.vocabulary) == (name, vocabulary)]
            here = sorted((one for one in here if one.milliseconds is not None), key=lambda one: one.tokens)
            style = {"marker": ".", "label": name, "linestyle": ":" if kind == "floor" else "-"}
            time.plot([one.tokens for one in here], [one.milliseconds for one in here], **style)
            held = [one for one in here if one.extra_bytes is not None]
            memory.plot([one.tokens for one in held], [(one.extra_bytes or 0) / 1e9 for one in held], **style)
        time.set(title=f"{vocabulary:,} entries", xlabel="tokens", ylabel="milliseconds", xscale="log", yscale="log")
        memory.set(xlabel="tokens", ylabel="extra GB", xscale="log")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(path)


def _figure(width: float, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _gigabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def _floor_milliseconds(found: Sequence[Measurement], tokens: int, vocabulary: int) -> float | None:
    for one in found:
        if one.kind == "floor" and (one.tokens, one.vocabulary) == (tokens, vocabulary):
            return one.milliseconds
    return None


def _floor_tflops(found: Sequence[Measurement], shape: LossShape) -> float | None:
    floor = _floor_milliseconds(found, shape.tokens, shape.vocabulary)
    return None if floor is None else plan_loss(shape, 2**40).flops / floor / 1e9
