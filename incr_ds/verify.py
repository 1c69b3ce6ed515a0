"""Proof of a growth: the same tokens through the source and the grown model, in transformers' own classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from incr_ds.arch.architecture import check_context
from incr_ds.arch.logical import LogicalCheckpoint
from incr_ds.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH = 128


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens: mean next-token losses, and the largest logit difference, absolute and relative to
    the largest logit of the source."""

    source_loss: float
    target_loss: float
    max_difference: float
    relative_difference: float
    tokens: int


def load_model(checkpoint: LogicalCheckpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint's weights in transformers' model class, in memory, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM  # seconds, for those who compare only

    architecture = checkpoint.architecture
    if architecture.family.upcycles:
        # transformers joins the experts' tensors as it loads a folder; its grouped products refuse some sizes.
        path, eager = checkpoint.facts.path, {"experts_implementation": "eager", "trust_remote_code": False}
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **eager).eval()
    config = AutoConfig.for_model(**{**architecture.config, "model_type": architecture.family.model_type})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    owned = dict(model.named_parameters())
    for spec in architecture.stored:
        owned[spec.name].data.copy_(checkpoint.read(spec.name))
    return model.eval()


def compare(
    source: LogicalCheckpoint,
    target: LogicalCheckpoint,
    batches: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    """Run ``batches`` (each [samples, tokens]) through both models; logits are compared over the source's vocabulary."""
    vocab = source.architecture.sizes["vocab"]
    if vocab > target.architecture.sizes["vocab"]:
        raise CheckpointError(
            f"{target.facts.path}: vocabulary {target.architecture.sizes['vocab']}, the source's is "
            f"{vocab}; logits cannot be compared."
        )
    for checkpoint in (source, target):
        check_context(checkpoint.architecture, max(batch.shape[-1] for batch in batches), str(checkpoint.facts.path))
    first, second = load_model(source, dtype), load_model(target, dtype)
    losses = torch.zeros(2, dtype=torch.float64)
    difference = largest = 0.0
    tokens = 0
    with torch.no_grad():
        for batch in batches:
            old, whole = first(batch).logits, second(batch).logits
            new = whole[..., :vocab]
            difference = max(difference, float((old - new).abs().max()))
            largest = max(largest, float(old.abs().max()))
            losses += torch.tensor([_summed_loss(old, batch), _summed_loss(whole, batch)], dtype=torch.float64)
            tokens += batch[:, 1:].numel()
    source_loss, target_loss = (losses / tokens).tolist()
    return Comparison(source_loss, target_loss, difference, difference / largest, tokens)


def usual_length(source: LogicalCheckpoint) -> int:
    """Tokens a sample where nobody asks for a number: as many as a table of learned positions has, at most LENGTH."""
    return min(LENGTH, source.architecture.sizes.get("positions", LENGTH))


def random_batches(vocab_size: int, samples: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """Uniform random tokens, one batch of one sample each: enough to compare functions, not to measure a loss."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (1, length), generator=generator) for _ in range(samples)]


def data_batches(prefix: Path, samples: int, length: int) -> list[torch.Tensor]:
    """The first ``samples`` runs of ``length`` tokens of a Megatron data set (documents joined as they come)."""
    if not prefix.with_name(prefix.name + ".idx").is_file():
        raise ConfigError(f"{prefix}.idx: missing; expected a Megatron data set's path without its ending.")
    with warnings.catch_warnings(action="ignore"):  # about GPU libraries that data sets do not need
        from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    found: list[torch.Tensor] = []
    held = torch.empty(0, dtype=torch.long)
    for document in range(len(dataset)):
        held = torch.cat([held, torch.as_tensor(dataset[document].astype("int64"))])
        while len(held) >= length and len(found) < samples:
            found.append(held[:length].unsqueeze(0))
            held = held[length:]
        if len(found) == samples:
            return found
    raise ConfigError(f"{prefix}: holds fewer than {samples} x {length} tokens; ask for fewer with --samples.")


def _summed_loss(logits: torch.Tensor, batch: torch.Tensor) -> float:
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return float(torch.nn.functional.cross_entropy(flat, batch[:, 1:].reshape(-1), reduction="sum"))
