"""The figures of runs: one panel for each kind of number, all runs in it, over their steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from incr_ds.report.drawing import colours, label, mark, new_figure, png_of
from incr_ds.report.history import History, number, set_name

Row = Mapping[str, Any]
DASHES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """A figure. ``series`` maps keys of a row to their names; values are multiplied by ``scale``. ``log``: the vertical axis."""

    title: str
    unit: str
    series: Mapping[str, str]
    log: bool = False
    scale: float = 1.0


PANELS = (
    Panel("Training loss", "nats per token", {"loss": "loss", "ce": "cross entropy"}),
    Panel("Distance to the teacher", "nats per token", {"divergence": "divergence"}),
    Panel("Router loss", "mean over layers", {"router_loss": "router loss"}),
    Panel("Largest expert", "share of tokens / even share", {"expert_load": "largest expert"}),
    Panel("Learning rate", "learning rate", {"learning_rate": "learning rate"}),
    Panel("Gradient norm", "before clipping", {"gradient_norm": "gradient norm"}, log=True),
    Panel("Throughput", "tokens per second", {"tokens_per_second": "tokens/s"}),
    Panel("Throughput of a process", "TFLOP/s", {"tflops_per_rank": "TFLOP/s"}),
    Panel("Share of the peak", "MFU", {"mfu": "MFU"}),
    Panel("Time lost", "seconds between logged steps", {"data_seconds": "waiting for data", "save_seconds": "saving"}),
    Panel("Memory of rank 0", "GB", {"memory_bytes": "now", "peak_memory_bytes": "peak"}, scale=1e-9),
)
HELD_OUT = "Held-out loss"
DISTANCE = Panel("Distance to the teacher on held-out data", "nats per token", {"teacher_kl": "KL(teacher || student)"})


def draw_runs(runs: Sequence[History]) -> dict[str, bytes]:
    """Every figure for which a run has numbers, as PNG by title. Growths are marked."""
    palette = colours([run.name for run in runs], "tab10")
    domains = list(dict.fromkeys(key for run in runs for key in run.domains))
    held_out = Panel(HELD_OUT, "nats per token", {key: set_name(key) for key in domains})
    training, *others = PANELS
    drawn = {
        panel.title: _draw(panel, runs, palette, rows)
        for panel, rows in (
            (training, _trained),
            (held_out, _evaluated),
            (DISTANCE, _evaluated),
            *((panel, _trained) for panel in others),
        )
    }
    return {title: png for title, png in drawn.items() if png is not None}


def _trained(run: History) -> Sequence[Row]:
    return run.trained


def _evaluated(run: History) -> Sequence[Row]:
    return run.evaluated


def _draw(
    panel: Panel, runs: Sequence[History], palette: Mapping[str, Any], rows_of: Callable[[History], Sequence[Row]]
) -> bytes | None:
    """The panel as PNG; None if no run has one of its numbers."""
    lines = [
        (run, name, dash, line)
        for run in runs
        for (key, name), dash in zip(panel.series.items(), DASHES * len(panel.series), strict=False)
        if (line := _line(rows_of(run), key, panel))
    ]
    if not lines:
        return None
    figure, (axes,) = new_figure(9.5, 3.4)
    for run, name, dash, (steps, values) in lines:
        shown = label(f"{run.name}: {name}" if len(runs) > 1 else name)
        style = {"marker": "."} if len(steps) < 60 else {}
        axes.plot(steps, values, dash, color=palette[run.name], label=shown, linewidth=1.2, **style)
    for run in runs:
        for row in run.grown:
            mark(axes, row["step"], "growth")
        for row in run.rolled_back:
            mark(axes, row["step"], "roll-back")
    axes.set(xlabel="step", ylabel=panel.unit, yscale="log" if panel.log else "linear")
    axes.legend(fontsize=8)
    return png_of(figure)


def _line(rows: Sequence[Row], key: str, panel: Panel) -> tuple[list[int], list[float]] | None:
    """Steps and values of one key, with gaps where there is none; None if it has none at all."""
    if key == "ce" and not any(number(row, "alpha") for row in rows):
        return None  # it is the loss
    found = [number(row, key) for row in rows]
    values = [math.nan if value is None or (panel.log and value <= 0.0) else value * panel.scale for value in found]
    if all(math.isnan(value) for value in values):
        return None
    return [row["step"] for row in rows], values
