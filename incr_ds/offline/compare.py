"""Proves a growth: runs the same tokens through the source and the grown model, in transformers' own classes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from incr_ds.arch.architecture import Architecture, check_context
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.offline.sentences import has_tokenizer, sentence_batches
from incr_ds.offline.tolerance import EXACT, ROUNDING_FACTOR
from incr_ds.sharding.joined import joined_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTH, SAMPLES = 128, 8

# Rounding at two scales: the first leaves weights that are already in 16 bits unchanged, but a growth's factors do not.
_SCALES = (1.0, 1.37)
_KEPT_LOGITS = 1 << 26  # number of the source's logits that are kept to measure rounding


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens: mean next-token losses and the largest logit difference.

    The difference is absolute, and relative to the largest logit of the source. ``rounding`` is the relative difference
    between the source and itself with weights rounded to 16 bits, if the target's are. ``problem`` is the reason why the
    logits cannot be compared: they are not finite, or all zero.
    """

    source_loss: float
    target_loss: float
    max_difference: float
    relative_difference: float
    tokens: int
    rounding: float | None = None
    problem: str | None = None

    @property
    def allowed(self) -> float:
        """The relative difference that rounding explains."""
        return EXACT if self.rounding is None else max(EXACT, ROUNDING_FACTOR * self.rounding)


def load_model(
    checkpoint: LogicalCheckpoint, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> PreTrainedModel:
    """Load the checkpoint's weights into transformers' model class, on ``device`` and in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM  # takes seconds, so only if models are compared
    from transformers.utils import logging

    logging.disable_progress_bar()  # this project shows its own progress
    architecture = checkpoint.architecture
    config = AutoConfig.for_model(**{**architecture.config, "model_type": architecture.family.model_type})
    # transformers' grouped matrix products of experts refuse some sizes.
    eager = {"experts_implementation": "eager"} if architecture.family.joined else {}
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **eager)
    for name, part in logical_parts(architecture, dict(model.named_parameters())).items():
        part.data.copy_(checkpoint.read(name))
    model.eval()
    torch.nn.Module.to(model, torch.device(device))
    return model


def logical_parts(architecture: Architecture, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every stored tensor by name, as a view of the parameter of transformers' module that holds it."""
    joined = joined_parameters(architecture)
    parts = {name: tensor for name, tensor in parameters.items() if name not in joined}
    for name, parameter in joined.items():
        matrix = parameters[name].view(parameter.whole.rows_shape)
        parts |= {block.name: matrix[block.row : block.row + block.shape[0]] for block in parameter.whole.blocks}
    return parts


def compare(
    source: LogicalCheckpoint,
    target: LogicalCheckpoint,
    batches: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> Comparison:
    """Run ``batches`` (each [samples, tokens]) through both models and compare logits over the source's vocabulary."""
    vocab = source.architecture.sizes["vocab"]
    if vocab > target.architecture.sizes["vocab"]:
        raise CheckpointError(
            f"{target.facts.path}: vocabulary {target.architecture.sizes['vocab']}, but the source's is "
            f"{vocab}; logits cannot be compared."
        )
    for checkpoint in (source, target):
        check_context(checkpoint.architecture, max(batch.shape[-1] for batch in batches), str(checkpoint.facts.path))
    first, second = load_model(source, dtype), load_model(target, dtype)
    seen = _Seen()
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for batch in batches:
            old, whole = first(batch).logits, second(batch).logits
            seen.add(old, whole, batch)
            if (1 + len(kept)) * old.numel() <= _KEPT_LOGITS or not kept:
                kept.append((batch, old))
    reduced = stored_dtype(target)
    if reduced is None or seen.problem():
        return seen.comparison(None)
    del second
    return seen.comparison(_rounding(first, kept, reduced) / seen.largest)


def stored_dtype(checkpoint: LogicalCheckpoint) -> torch.dtype | None:
    """The 16-bit dtype of the stored weights, or None if they are all wider."""
    dtypes = {checkpoint.read(spec.name, bounds=((0, 1),)).dtype for spec in checkpoint.architecture.stored}
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), None)


class _Seen:
    """Sums over the logits of two models."""

    def __init__(self) -> None:
        self.losses = torch.zeros(2, dtype=torch.float64)
        self.difference = self.largest = 0.0
        self.tokens = self.logits = 0
        self.not_finite = [0, 0]

    def add(self, old: torch.Tensor, whole: torch.Tensor, batch: torch.Tensor) -> None:
        new = whole[..., : old.shape[-1]]
        for model, logits in enumerate((old, new)):
            self.not_finite[model] += int((~logits.isfinite()).sum())
        self.logits += old.numel()
        self.difference = max(self.difference, float((old - new).abs().max()))
        self.largest = max(self.largest, float(old.abs().max()))
        self.losses += torch.tensor([_summed_loss(old, batch), _summed_loss(whole, batch)], dtype=torch.float64)
        self.tokens += batch[:, 1:].numel()

    def problem(self) -> str | None:
        """The reason why the logits cannot be compared, or None."""
        for model, count in zip(("source", "target"), self.not_finite, strict=True):
            if count:
                return f"{count:,} of {self.logits:,} logits of the {model} are not finite"
        return "every logit of the source is zero" if self.largest == 0 else None

    def comparison(self, rounding: float | None) -> Comparison:
        source_loss, target_loss = (self.losses / self.tokens).tolist()
        problem = self.problem()
        relative = math.nan if problem else self.difference / self.largest
        difference = math.nan if any(self.not_finite) else self.difference
        return Comparison(source_loss, target_loss, difference, relative, self.tokens, rounding, problem)


def _rounding(model: PreTrainedModel, kept: Sequence[tuple[torch.Tensor, torch.Tensor]], reduced: torch.dtype) -> float:
    """The largest logit difference if a model's weights are rounded to ``reduced``. The model keeps the rounded weights."""
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    found = 0.0
    for scale in _SCALES:
        for name, parameter in model.named_parameters():
            parameter.data = (weights[name] * scale).to(reduced).to(weights[name].dtype) / scale
        with torch.no_grad():
            found = max([found, *(float((model(batch).logits - old).abs().max()) for batch, old in kept)])
    return found


@dataclass(frozen=True)
class Tokens:
    """The tokens on which two models are compared, and their origin as a phrase."""

    batches: Sequence[torch.Tensor]
    origin: str


def usual_tokens(
    source: LogicalCheckpoint,
    folders: Sequence[Path],
    data: Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    *,
    trust: bool = False,
) -> Tokens:
    """Tokens of ``data``, otherwise sentences in the tokenizer of the first of ``folders`` with one, otherwise random tokens.

    Raises ConfigError if there are fewer samples than requested.
    """
    count, size = samples or SAMPLES, length or usual_length(source)
    vocabulary = source.architecture.sizes["vocab"]
    if data is not None:
        return Tokens(data_batches(data, count, size), f"of {data}")
    why = "no tokenizer beside the weights"
    if (folder := next(filter(has_tokenizer, folders), None)) is not None:
        try:
            batches = sentence_batches(folder, vocabulary, count, size, trust=trust)
        except ConfigError as error:
            why = str(error)
        else:
            if samples is not None and len(batches) < samples:
                raise ConfigError(
                    f"--samples {samples}: the built-in sentences give {len(batches)} samples of {size} tokens; pass a "
                    "data set with --data for more."
                )
            return Tokens(batches, "of the built-in sentences")
    return Tokens(random_batches(vocabulary, count, size), f"drawn at random ({why}; pass a data set with --data)")


def usual_length(source: LogicalCheckpoint) -> int:
    """The default number of tokens per sample: the number of learned positions, or LENGTH if that is smaller."""
    return min(LENGTH, source.architecture.sizes.get("positions", LENGTH))


def random_batches(vocab_size: int, samples: int, length: int, seed: int = 0) -> list[torch.Tensor]:
    """Uniform random tokens, one batch of one sample each: enough to compare functions, not to measure a loss."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (1, length), generator=generator) for _ in range(samples)]


def data_batches(prefix: Path, samples: int, length: int) -> list[torch.Tensor]:
    """The first ``samples`` spans of ``length`` tokens in a Megatron data set, with documents concatenated."""
    if not prefix.with_name(prefix.name + ".idx").is_file():
        raise ConfigError(f"{prefix}.idx: missing; expected a Megatron data set's path without the extension.")
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
    raise ConfigError(f"{prefix}: holds fewer than {samples} x {length} tokens; request fewer with --samples.")


def _summed_loss(logits: torch.Tensor, batch: torch.Tensor) -> float:
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return float(torch.nn.functional.cross_entropy(flat, batch[:, 1:].reshape(-1), reduction="sum"))
