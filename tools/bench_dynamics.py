"""Losses of a grown model and its source over the same 40 AdamW steps, with the learning-rate multipliers and without."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.table import Table
from torch.nn.functional import cross_entropy

from incr_ds.arch.multipliers import UNCHANGED, Multipliers
from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json
from incr_ds.config.growth import GrowthRecipe
from incr_ds.growth.apply import GrownTensors
from incr_ds.growth.planner import plan_growth
from incr_ds.testing.checkpoint import MemoryCheckpoint
from incr_ds.testing.memory import drawn_model, small_architecture

SETTINGS = {"lr": 3e-3, "eps": 1e-6, "weight_decay": 0.1}
BETAS, BEFORE, AFTER = (0.9, 0.95), 20, 40
# Family, operator of the hidden size, and the hidden size that the source's 96 grows to.
GROWTHS = [
    ("llama", "integer", 192),
    ("llama", "isometric", 144),
    ("llama", "isometric", 240),
    ("llama", "zero", 144),
    ("llama", "lemon", 240),
    ("gpt2", "integer", 192),
    ("gpt2", "mean", 144),
]
RULES = ("multipliers", "one rate", "reset")


@command
def main(
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON here.")] = None,
    json: Json = False,
) -> None:
    """Train tiny tied models in fp64 and their growths on the same tokens; print by how many nats losses differ."""
    rows = [measure(*growth) for growth in GROWTHS]
    report = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "steps": AFTER,
        "rows": rows,
    }
    if output:
        output.write_text(json_text(report), encoding="utf-8")
    if json:
        print_json(report)
        return
    table = Table("family", "hidden", "size", "source's loss", *RULES)
    for row in rows:
        fallen = f"{row['from']:.2f} to {row['to']:.2f}"
        table.add_row(
            row["family"], row["hidden"], f"96 to {row['size']}", fallen, *(f"{row[rule]:.1e}" for rule in RULES)
        )
    console.print(table)


def measure(family: str, hidden: str, size: int) -> dict[str, Any]:
    """The largest |loss - source's loss| in nats over the steps after the growth, by rule, and the source's losses' ends.

    ``multipliers`` trains as the plan says, ``one rate`` with the grown moments but every tensor alike, ``reset`` with neither.
    """
    architecture = small_architecture(family, tie_word_embeddings=True)
    source = drawn_model(architecture)
    optimizer = adamw(source.named_parameters(), lambda name: UNCHANGED)
    train(source, optimizer, batches(BEFORE, 1))
    checkpoint = checkpoint_of(architecture, source, optimizer)
    expected = train(source, optimizer, batches(AFTER, 2))
    found = {}
    for rule in RULES:
        losses = grown_losses(checkpoint, recipe_of(architecture, hidden, size, rule), rule)
        found[rule] = max(abs(a - b) for a, b in zip(expected, losses, strict=True))
    return {"family": family, "hidden": hidden, "size": size, "from": expected[0], "to": expected[-1], **found}


def recipe_of(architecture: Any, hidden: str, size: int, rule: str) -> GrowthRecipe:
    """``hidden`` for the residual stream; heads and FFN grow along by copies, since they often must."""
    axes, old = architecture.family.axes, architecture.sizes
    target = {axes["hidden"]: size, axes["ffn"]: 500}
    if "head_dim" not in axes:
        target[axes["heads"]] = size // old["head_dim"]
    copied = {"ffn": {"new": "copy"}, "heads": {"new": "copy"}, "symmetry_breaking": {"method": "none"}}
    mode = "reset" if rule == "reset" else "rescale"
    return GrowthRecipe.model_validate({"target": target, "width": {"hidden": hidden, **copied}, "optimizer": mode})


def grown_losses(checkpoint: MemoryCheckpoint, recipe: GrowthRecipe, rule: str) -> list[float]:
    """Losses of the grown model's steps."""
    grown = GrownTensors(plan_growth(checkpoint.architecture, recipe), checkpoint)
    model = drawn_model(grown.plan.target)
    own = grown.plan.nearest_multipliers if rule == "multipliers" else lambda name: UNCHANGED
    optimizer = adamw(model.named_parameters(), own)
    for name, parameter in model.named_parameters():
        bounds = tuple((0, length) for length in parameter.shape)
        parameter.data.copy_(grown.read(name, "weight", bounds))
        if rule != "reset":
            moments = {state: grown.read(name, state, bounds) for state in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(checkpoint.facts.step or 0)), **moments}
    return train(model, optimizer, batches(AFTER, 2))


def adamw(parameters: Iterable[tuple[str, Any]], multipliers: Callable[[str], Multipliers]) -> torch.optim.AdamW:
    """One group a tensor; matrices decay, as in a run."""
    groups = []
    for name, parameter in parameters:
        decay = SETTINGS["weight_decay"] if parameter.ndim > 1 else 0.0
        groups.append({"params": [parameter], **multipliers(name).applied({**SETTINGS, "weight_decay": decay})})
    return torch.optim.AdamW(groups, betas=BETAS)


def checkpoint_of(architecture: Any, model: torch.nn.Module, optimizer: torch.optim.AdamW) -> MemoryCheckpoint:
    """The model and its moments as they are now."""
    named = dict(model.named_parameters())
    tensors: dict[Any, Any] = {"weight": {name: parameter.detach().clone() for name, parameter in named.items()}}
    for state in ("exp_avg", "exp_avg_sq"):
        tensors[state] = {name: optimizer.state[parameter][state].clone() for name, parameter in named.items()}
    return MemoryCheckpoint(architecture, tensors, step=BEFORE)


def train(model: torch.nn.Module, optimizer: torch.optim.AdamW, data: list[torch.Tensor]) -> list[float]:
    """The loss of each step."""
    losses = []
    for tokens in data:
        logits = model(tokens).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def batches(count: int, seed: int) -> list[torch.Tensor]:
    """Random tokens [4, 24], four batches again and again, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    some = [torch.randint(101, (4, 24), generator=generator) for _ in range(4)]
    return [some[number % 4] for number in range(count)]


def json_text(report: dict[str, Any]) -> str:
    """The report as a file's content."""
    return json.dumps(report, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    main()
