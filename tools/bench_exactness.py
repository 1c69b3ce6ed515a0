"""How far rounding moves the logits of exact growths: tiny models of every family, grown in fp64, fp32 and bf16."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.table import Table

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.family import families
from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json
from incr_ds.config.growth import GrowthRecipe
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.planner import plan_growth
from incr_ds.offline.compare import random_batches
from incr_ds.testing.memory import drawn_model, model_checkpoint, small_architecture

# The dtype of the source's weights, and that of the grown model's. What rounds is the growth, the result, or neither.
CASES = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16 source, fp32 result": (torch.bfloat16, torch.float32),
    "bf16 source, bf16 result": (torch.bfloat16, torch.bfloat16),
}
FACTORS = {"integer x 2": 2, "integer x 3": 3, "uneven": None}


@command
def main(
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
    json: Json = False,
) -> None:
    """Measure the largest logit difference, relative to the source's largest logit, through unmodified transformers."""
    rows = [measure(name, growth) for name in sorted(families()) for growth in FACTORS]
    report = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "rows": rows,
    }
    if output:
        output.write_text(json_text(report), encoding="utf-8")
    if json:
        print_json(report)
        return
    table = Table("family", "hidden size", *CASES)
    for row in rows:
        table.add_row(row["family"], row["growth"], *(f"{row[case]:.1e}" for case in CASES))
    console.print(table)


def measure(name: str, growth: str) -> dict[str, Any]:
    """One family under one growth of everything, in every case."""
    architecture = small_architecture(name)
    recipe = GrowthRecipe.model_validate(
        {"target": target_of(architecture, FACTORS[growth]), "width": {"heads": {"new": "copy"}}}
    )
    found = {case: difference(architecture, recipe, *dtypes) for case, dtypes in CASES.items()}
    return {"family": name, "growth": growth, **found}


def target_of(architecture: Architecture, factor: int | None) -> dict[str, int]:
    """Larger FFN, depth and hidden size: by ``factor``, or by 1.5 or 2.25 where that is not whole."""
    axes, old = architecture.family.axes, architecture.sizes
    target = {axes["ffn"]: 331, axes["layers"]: 5}
    own_head_size = "head_dim" in axes
    hidden = factor * old["hidden"] if factor else (132 if own_head_size else 2 * old["hidden"] + old["head_dim"])
    if architecture.family.equal_copies and factor is None:
        hidden = 2 * old["hidden"]
    target[axes["hidden"]] = hidden
    if not own_head_size:
        target |= {axes[axis]: hidden // old["head_dim"] for axis in ("heads", "kv_heads") if axis in axes}
        if architecture.family.equal_copies:
            target[axes["kv_heads"]] = old["kv_heads"] * hidden // old["hidden"]
    return target


def difference(architecture: Architecture, recipe: GrowthRecipe, source: torch.dtype, result: torch.dtype) -> float:
    """Relative logit difference; both models compute in the wider of fp32 and their own dtype."""
    computed = torch.float64 if source == torch.float64 else torch.float32
    old = drawn_model(architecture, computed)
    for parameter in old.parameters():
        parameter.data = parameter.data.to(source).to(computed)
    grown = GrownTensors(plan_growth(architecture, recipe), model_checkpoint(architecture, old))
    new = drawn_model(grown.plan.target, computed)
    for name, parameter in new.named_parameters():
        bounds = tuple((0, size) for size in parameter.shape)
        parameter.data.copy_(grown.read(name, "weight", bounds).to(result))
    batches = random_batches(architecture.sizes["vocab"], 4, 32)
    with torch.no_grad():
        pairs = [(old(tokens).logits, new(tokens).logits) for tokens in batches]
    largest = max(float(before.abs().max()) for before, _ in pairs)
    return max(float((before - after).abs().max()) for before, after in pairs) / largest


def json_text(report: dict[str, Any]) -> str:
    """The report as a file's content."""
    return json.dumps(report, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    main()
