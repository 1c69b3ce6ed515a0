"""Writes a teacher's cache: runs the teacher over the samples that a run will read, and keeps its most probable entries.

The teacher's modules are those of training, so that the entries are what a run without a cache would compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import xxhash
from safetensors.numpy import save
from torch import Tensor

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.flops import forward_flops_per_token
from incr_ds.arch.training import check_trainable
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.integrity import open_described
from incr_ds.checkpoint.publish import check_writable, flushed_digest, refuse_existing
from incr_ds.checkpoint.workspace import open_workspace
from incr_ds.config.fields import merged, parse_settings
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.training import RunSettings
from incr_ds.data.samples import Samples
from incr_ds.data.teacher_cache import INDICES, KIND, LOG_PROBS, STORED, CacheFacts
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.model.attention import check_attention, check_capped_scores
from incr_ds.model.layers import LayerFactory
from incr_ds.model.liger import use_liger
from incr_ds.model.teacher import Teacher
from incr_ds.model.tensor_parallel import TensorRanks
from incr_ds.model.weights import CheckpointWeights
from incr_ds.offline.memory_budget import check_disk
from incr_ds.train.cached_teacher import cache_facts, cached_samples, first_sample
from incr_ds.train.engine import DTYPES
from incr_ds.train.inputs import open_data

LOGIT_BYTES = 64 << 20  # fp32 logits that exist at once
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class CacheRequest:
    """What to cache: the teacher of ``run``, ``top_k`` entries per token, log-probabilities in ``stored``."""

    run: RunSettings
    output: Path
    top_k: int
    stored: Literal["fp16", "fp32"] = "fp16"
    shard_samples: int | None = None


@dataclass(frozen=True)
class WrittenCache:
    """A cache, its size without the manifest, the teacher's operations in this call, and the shards that existed before."""

    facts: CacheFacts
    num_bytes: int
    flops: int
    resumed_shards: int


def write_cache(request: CacheRequest, report: Report) -> WrittenCache:
    """Write the cache in this process. After an interruption, the same request goes on behind the last whole shard.

    ``report`` is called with the number of finished shards and of all. Raises ConfigError for a run without a teacher or a
    request that does not fit it, CheckpointError for an output that exists.
    """
    run = request.run
    check_cacheable(run, request.output)
    refuse_existing(request.output)
    check_writable(request.output.parent)
    assert run.distillation is not None
    checkpoint = open_described(Path(run.distillation.teacher))
    architecture = checkpoint.architecture
    vocabulary = architecture.sizes["vocab"]
    if not 1 <= request.top_k <= vocabulary:
        raise ConfigError(f"--top-k {request.top_k}: expected 1 to {vocabulary}, the teacher's vocabulary.")
    samples = cached_samples(run, run.schedule.start_step, first_sample(run))
    data = open_data(run, architecture)
    facts = cache_facts(
        run,
        data,
        checkpoint,
        samples,
        vocabulary=vocabulary,
        top_k=request.top_k,
        stored=request.stored,
        shard_samples=request.shard_samples,
    )
    with open_workspace(request.output, _key(facts, run)) as space, space.recording():
        before, shards = dict(space.done), list(facts.shards())
        left = [(name, numbers) for name, numbers in shards if name not in before]
        count = sum(len(numbers) for _, numbers in left)
        if not before:  # its error would discard them
            check_disk(space.folder, facts.sample_bytes * count, len(left), str(request.output))
        teacher = CachingTeacher(run, checkpoint)
        for name, numbers in left:
            entries = _entries(teacher, data.train, numbers, facts, run.batch.micro_batch_size)
            (space.folder / name).write_bytes(save(entries))  # save_file makes files that only their owner can read
            space.record(name, flushed_digest(space.folder / name))
            report(len(space.done), len(shards))
        space.publish(KIND, {"cache": facts.model_dump()})
    tokens = count * facts.sequence_length
    flops = tokens * forward_flops_per_token(architecture, facts.sequence_length)
    return WrittenCache(facts, facts.samples * facts.sample_bytes, flops, len(before))


def _key(facts: CacheFacts, run: RunSettings) -> str:
    """A hash of all that decides the bytes of a shard, down to its rounding."""
    content = [facts.model_dump(), run.model.attention, run.model.layer_kernels, run.batch.micro_batch_size]
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def check_cacheable(run: RunSettings, output: Path) -> None:
    """Raise ConfigError unless ``run`` could read a cache of its teacher from ``output``, and the teacher counts."""
    if run.distillation is None:
        raise ConfigError("distillation: the run file has no such section, so there is no teacher to cache; add it.")
    # What a run with this cache could not be.
    reading = merged(run.model_dump(), {"distillation": {"cache": str(output)}})
    parse_settings(reading, RunSettings, "a run that reads this cache")
    if run.distillation.weight == 0 or not cached_samples(run, run.schedule.start_step, 0):
        raise ConfigError(
            "distillation: the teacher's weight is 0 in every step of the run, so there is nothing to cache; raise "
            "distillation.weight or anneal_steps."
        )


class CachingTeacher:
    """The teacher of a run in one process, as the run would build it."""

    def __init__(self, run: RunSettings, checkpoint: LogicalCheckpoint) -> None:
        architecture: Architecture = checkpoint.architecture
        check_trainable(architecture)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_attention(run.model.attention, self._device)
        check_capped_scores(run.model.attention, architecture)
        if run.model.layer_kernels == "liger":
            use_liger(architecture.family.model_type, self._device)
        factory = LayerFactory(
            architecture,
            TensorRanks(None, 0, 1),
            CheckpointWeights(checkpoint),
            DTYPES[run.precision],
            self._device,
            run.model.attention,
        )
        self._teacher = Teacher(factory, ParallelLayout(), 0)
        self._softcap = architecture.logit_softcap
        self._vocabulary = architecture.sizes["vocab"]

    @torch.no_grad()
    def top_entries(self, input_ids: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The ``top_k`` most probable entries at ``temperature`` for each token of ``input_ids`` [B, S].

        Returns indices, int64, and fp32 log-probabilities, [B, S, K] each, in falling order.
        """
        hidden = self._teacher.forward(input_ids.to(self._device))  # [B, S, H]
        head = self._teacher.head
        assert head is not None
        weight = head[: self._vocabulary].float()  # [V, H]
        found = [
            self._of_rows(rows.float() @ weight.t(), top_k, temperature)
            for rows in hidden.flatten(0, 1).split(max(1, LOGIT_BYTES // (4 * self._vocabulary)))
        ]
        log_probs, indices = (torch.cat(part).view(*input_ids.shape, top_k).cpu() for part in zip(*found, strict=True))
        return indices, log_probs

    def _of_rows(self, logits: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probabilities and indices, [C, K] each, from ``logits`` [C, V]."""
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        log_probs, indices = torch.log_softmax(logits / temperature, dim=-1).topk(top_k)
        return log_probs, indices


def _entries(
    teacher: CachingTeacher, samples: Samples, numbers: range, facts: CacheFacts, at_once: int
) -> dict[str, np.ndarray]:
    """The content of the shard with the samples ``numbers``, computed for ``at_once`` samples at a time."""
    shape = (len(numbers), facts.sequence_length, facts.top_k)
    indices, log_probs = np.empty(shape, facts.index_dtype), np.empty(shape, STORED[facts.stored])
    for start in range(0, len(numbers), at_once):
        part = numbers[start : start + at_once]
        input_ids = torch.from_numpy(np.stack([samples.tokens(number)[:-1] for number in part]).astype(np.int64))
        found, values = teacher.top_entries(input_ids, facts.top_k, facts.temperature)
        rounded = values.numpy().astype(STORED[facts.stored])
        if not np.isfinite(rounded).all():
            raise CheckpointError(
                f"{facts.teacher}: samples {part.start} to {part[-1]}: log-probabilities that are not finite in {facts.stored}; "
                "the teacher's weights are damaged, or --stored fp32 is needed."
            )
        indices[start : start + len(part)], log_probs[start : start + len(part)] = found.numpy(), rounded
    return {INDICES: indices, LOG_PROBS: log_probs}
