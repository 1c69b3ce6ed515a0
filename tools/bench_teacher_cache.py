"""What a cached teacher loses: divergence and gradient against the whole teacher, by number of entries and their format."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor

from incr_ds.checkpoint.integrity import open_described
from incr_ds.cli.command import command, console, print_json
from incr_ds.cli.options import Json
from incr_ds.data.fingerprint import describe
from incr_ds.data.samples import open_held_out_data
from incr_ds.data.targets import Targets
from incr_ds.data.teacher_cache import STORED
from incr_ds.losses.distillation import DistillationLoss, distillation_loss
from incr_ds.losses.teachers import split_targets
from incr_ds.offline.compare import load_model

Stored = Literal["fp16", "fp32"]


@dataclass(frozen=True)
class Row:
    """One cache: bytes per token, the divergence in nats per token, and the relative error of the distillation gradient."""

    top_k: int
    stored: Stored
    bytes_per_token: int
    divergence: float
    gradient_error: float


@command
def main(
    teacher: Annotated[Path, typer.Option(help="Checkpoint that teaches.")],
    student: Annotated[Path, typer.Option(help="Checkpoint of the same vocabulary that is taught.")],
    data: Annotated[str, typer.Option(help="Megatron data set: path without .bin.")],
    output: Annotated[Path, typer.Option(help="JSON file to write.")],
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens per sample.")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples.")] = 32,
    json_only: Json = False,
) -> None:
    """Measure top-k entries in fp16 and fp32 against the teacher's whole distribution."""
    with tempfile.TemporaryDirectory() as cache:
        held_out = open_held_out_data(describe(data), sequence_length, Path(cache), samples)
        tokens = torch.from_numpy(np.stack([held_out.tokens(number) for number in range(samples)]))
    found = measure(teacher, student, tokens)
    output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if json_only:
        print_json(found)
        return
    table = Table("entries", "stored", "bytes per token", "divergence", "gradient error")
    for row in found["rows"]:
        shown = f"{row['divergence']:.5f}", f"{row['gradient_error']:.2e}"
        table.add_row(str(row["top_k"]), row["stored"], str(row["bytes_per_token"]), *shown)
    console.print(table)
    console.print(f"the whole teacher: divergence {found['divergence']:.5f}")


def measure(teacher: Path, student: Path, tokens: Tensor) -> dict[str, Any]:
    """All rows on ``tokens`` [samples, length + 1], and the divergence from the whole teacher."""
    logits, (hidden, head) = _logits(teacher, tokens), _student(student, tokens)
    labels, vocabulary = tokens[:, 1:].flatten(), logits.shape[-1]
    whole, reference = _taught((labels, *_entries(logits, vocabulary, "fp32")), hidden, head)
    rows = []
    for top_k in [k for k in (4, 16, 64, 256) if k < vocabulary] + [vocabulary]:
        for stored in ("fp16", "fp32"):
            loss, gradient = _taught((labels, *_entries(logits, top_k, stored)), hidden, head)
            error = float((gradient - reference).norm() / reference.norm())
            size = top_k * (np.min_scalar_type(vocabulary - 1).itemsize + STORED[stored].itemsize)
            rows.append(Row(top_k, stored, size, float(loss.divergence), error))
    facts = {"vocabulary": vocabulary, "tokens": labels.numel(), "divergence": float(whole.divergence)}
    return {**facts, "rows": [asdict(row) for row in rows]}


def _logits(folder: Path, tokens: Tensor) -> Tensor:
    model = load_model(open_described(folder))
    with torch.no_grad():
        found: Tensor = torch.cat([model(sample[None, :-1]).logits[0].float() for sample in tokens])
    return found  # [N, V]


def _student(folder: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The student's hidden states [N, H] before its head, and the head [V, H]."""
    model = load_model(open_described(folder))
    with torch.no_grad():
        hidden = torch.cat([model.model(sample[None, :-1]).last_hidden_state[0] for sample in tokens])
    return hidden, model.get_output_embeddings().weight.detach()


def _entries(logits: Tensor, top_k: int, stored: Stored) -> tuple[Tensor, Tensor]:
    log_probs, indices = torch.log_softmax(logits, dim=-1).topk(top_k)
    return indices, torch.from_numpy(log_probs.numpy().astype(STORED[stored]))


def _taught(targets: Targets, hidden: Tensor, head: Tensor) -> tuple[DistillationLoss, Tensor]:
    """The divergence alone as the loss, and its gradient with respect to the hidden states."""
    labels, teacher = split_targets(targets, head.shape[0])
    leaf = hidden.clone().requires_grad_()
    loss = distillation_loss(leaf, head, labels, teacher=teacher, alpha=1.0)
    loss.loss.backward()
    assert leaf.grad is not None
    return loss, leaf.grad


if __name__ == "__main__":
    main()
