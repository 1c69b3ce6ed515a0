"""What is measured on a checkpoint of a study: held-out loss by domain, cloze accuracy, and how alike its layers are."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.integrity import open_described
from incr_ds.data.fingerprint import describe
from incr_ds.data.samples import open_held_out_data
from incr_ds.offline.compare import load_model
from incr_ds.offline.repetition import repetition_gain
from incr_ds.offline.text_loss import loss_sum
from incr_ds.train.evaluation import bits_per_byte

CHOICES, CONTEXT, ENDING = 4, 48, 16  # of the cloze questions: endings to choose from, tokens before and in an ending
BATCH = 16


@dataclass(frozen=True)
class Measures:
    """Measures of one checkpoint.

    ``losses`` (nats per token) and ``bits_per_byte`` are by domain, ``loss`` is the mean of ``losses``. ``cloze`` is how often
    the true ending of a held-out text is the most probable of 4 (chance: 0.25). ``repetition_gain`` is explained in
    incr_ds/offline/repetition.py. ``layer_distance`` is the mean relative
    distance between the matrices of neighbouring layers, and ``effective_rank`` the mean of exp(entropy of the singular
    values) / rank (Roy and Vetterli 2007).
    """

    loss: float
    losses: dict[str, float]
    bits_per_byte: dict[str, float | None]
    cloze: float
    repetition_gain: float
    layer_distance: float | None
    effective_rank: float


@torch.no_grad()
def measure(folder: Path, held_out: Mapping[str, str], samples: int, length: int) -> Measures:
    """Measure the checkpoint ``folder`` on the first ``samples`` sequences of each held-out data set, by domain."""
    checkpoint = open_described(folder)
    model, losses, right = load_model(checkpoint, torch.float32), {}, []
    with tempfile.TemporaryDirectory() as cache:
        for domain, prefix in held_out.items():
            data = open_held_out_data(describe(prefix), length, Path(cache), samples)
            # tokens: [samples, length + 1]
            tokens = torch.stack([torch.from_numpy(data.tokens(number)) for number in range(samples)])
            losses[domain] = sum(loss_sum(model, rows) for rows in tokens.split(BATCH)) / (samples * length)
            right.append(_cloze(model, tokens))
    return Measures(
        loss=sum(losses.values()) / len(losses),
        losses=losses,
        bits_per_byte={domain: bits_per_byte(losses[domain], prefix) for domain, prefix in held_out.items()},
        cloze=sum(right) / len(right),
        repetition_gain=repetition_gain(model, checkpoint.architecture.sizes["vocab"], length),
        layer_distance=layer_distance(checkpoint),
        effective_rank=mean_effective_rank(checkpoint),
    )


def _cloze(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Ask for the true ending of each text among those of the next ones."""
    texts = tokens[:, : CONTEXT + ENDING]
    right = 0
    for number in range(len(texts)):
        endings = [texts[(number + other) % len(texts), CONTEXT:] for other in range(CHOICES)]
        rows = torch.stack([torch.cat([texts[number, :CONTEXT], ending]) for ending in endings])
        logits = model(rows[:, :-1]).logits.float()[:, CONTEXT - 1 :]  # [CHOICES, ENDING, V]
        scores = logits.log_softmax(-1).gather(-1, rows[:, CONTEXT:, None]).sum((1, 2))
        right += int(scores.argmax().item() == 0)
    return right / len(texts)


def layer_distance(checkpoint: LogicalCheckpoint) -> float | None:
    """Mean over pairs of neighbouring layers and their matrices of |A - B| / sqrt(|A| |B|). None if there is one layer."""
    layers = _matrices(checkpoint)
    distances = [
        (first[name] - second[name]).norm() / (first[name].norm() * second[name].norm()).sqrt()
        for first, second in zip(layers, layers[1:], strict=False)
        for name in first
    ]
    return torch.stack(distances).mean().item() if distances else None


def mean_effective_rank(checkpoint: LogicalCheckpoint) -> float:
    """Mean over the matrices of all layers of exp(entropy of normalized singular values) / smaller side."""
    ranks = [effective_rank(matrix) / min(matrix.shape) for layer in _matrices(checkpoint) for matrix in layer.values()]
    return sum(ranks) / len(ranks)


def effective_rank(matrix: torch.Tensor) -> float:
    """exp(entropy) of the singular values of ``matrix``, normalized to sum 1."""
    values = torch.linalg.svdvals(matrix.double())
    shares = values / values.sum()
    return math.exp(-(shares * shares.clamp_min(1e-300).log()).sum().item())


def _matrices(checkpoint: LogicalCheckpoint) -> list[dict[str, torch.Tensor]]:
    """The matrices of every layer, by their name without the layer's number."""
    layers: dict[int, dict[str, torch.Tensor]] = {}
    for spec in checkpoint.architecture.stored:
        if spec.layer is not None and spec.is_matrix:
            name = spec.name.replace(f".{spec.layer}.", ".", 1)
            layers.setdefault(spec.layer, {})[name] = checkpoint.read(spec.name).float()
    return [layers[number] for number in sorted(layers)]
