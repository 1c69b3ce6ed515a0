"""Time and memory of the distillation loss, beside the products alone and other implementations."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from incr_ds.bench.measure import Measurement, copy_bandwidth, machine, measure_grid
from incr_ds.bench.report import result_table, summarise, write_report
from incr_ds.bench.variants import VARIANTS
from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json
from incr_ds.errors import ConfigError
from incr_ds.losses.planner import LossShape, Speeds, default_budget, plan_loss, plan_recompute


class Grid(StrEnum):
    """Which shapes."""

    small = "small"
    reference = "reference"
    full = "full"


REFERENCE = LossShape(8192, 128256, 4096, 2048)
SHAPES = {
    Grid.small: [LossShape(256, 2000, 128, 64)],
    Grid.reference: [REFERENCE],
    Grid.full: [
        REFERENCE,
        *(
            LossShape(tokens, vocabulary, 4096, 2048)
            for vocabulary in (128256, 32000, 151936)
            for tokens in (4096, 8192, 16384, 32768)
            if (tokens, vocabulary) != (8192, 128256)
        ),
    ],
}


@command
def main(
    output: Annotated[Path, typer.Option(help="Folder for loss.json, loss.md and the figures.")],
    grid: Annotated[Grid | None, typer.Option(help="Shapes; default: full on CUDA, small elsewhere.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed passes of each variant.")] = 30,
    seconds: Annotated[float, typer.Option(help="Begin no further shape after this time.")] = 480.0,
    budget_gb: Annotated[float, typer.Option(help="Memory for logits that the printed plan has.")] = 2.5,
    only: Annotated[list[str] | None, typer.Option(help="Variants whose name contains this.")] = None,
    json: Json = False,
) -> None:
    """Measure every variant on this machine: a CUDA device in bf16, else the CPU in fp32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = SHAPES[grid or (Grid.full if device.type == "cuda" else Grid.small)]
    variants = [one for one in VARIANTS if only is None or any(word in one.name for word in only)]
    if not variants:
        names = ", ".join(one.name for one in VARIANTS)
        raise ConfigError(f"--only {only}: no variant has such a name; the variants are: {names}")
    bandwidth, found = copy_bandwidth(device), list[Measurement]()
    for measured in measure_grid(shapes, variants, repeats, dtype, device, seconds):
        found += measured
        summary = summarise(found, shapes, machine(device), bandwidth)
        paths = write_report(summary, found, output)  # after every shape: what was measured is never lost
    if json:
        print_json(summary)
        return
    _show(found, summary["shapes"][0]["floor_tflops"], bandwidth, int(budget_gb * 1e9), shapes)
    console.print("wrote " + ", ".join(str(path) for path in paths))


def _show(
    found: list[Measurement], tflops: float | None, bandwidth: float, budget: int, shapes: list[LossShape]
) -> None:
    console.print(result_table(found).on_console())
    if tflops is None:
        return
    for shape in shapes:
        recompute = plan_recompute(shape, default_budget(True, recompute=True), accumulates=True)
        for plan in (plan_loss(shape, budget), recompute):
            described = plan.describe(Speeds(tflops, bandwidth))
            console.print(f"planned for N={shape.tokens} V={shape.vocabulary}: {described}")


if __name__ == "__main__":
    main()
