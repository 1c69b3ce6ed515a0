"""Writes a teacher's cache: runs the teacher over the samples that a run will read, and keeps its most probable entries.

The teacher's modules are those of training, so that the entries are what a run without a cache would compute. Several ranks
hold it as tensor ranks do, and rank 0 writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from safetensors.numpy import save
from torch import Tensor
from torch.nn.functional import pad

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.flops import forward_flops_per_token
from incr_ds.arch.training import check_trainable
from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.integrity import open_described
from incr_ds.checkpoint.publish import check_writable, flushed_digest, refuse_existing
from incr_ds.checkpoint.workspace import Workspace, open_workspace
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
from incr_ds.offline.process_group import SINGLE_PROCESS, ProcessGroup, agree, on_first
from incr_ds.sharding.placement import check_layout, split_bounds
from incr_ds.train.cached_teacher import cache_facts, cached_samples, first_sample
from incr_ds.train.distributed import initialize_distributed
from incr_ds.train.engine import DTYPES
from incr_ds.train.inputs import Data, open_data
from incr_ds.train.ranks import all_ranks

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
    """Write the cache. After an interruption, the same request goes on behind the last whole shard.

    All ranks call this (``join_ranks``), and each holds its share of the teacher. ``report`` is called with the number of
    finished shards and of all. Raises ConfigError for a run without a teacher or a request that does not fit it, LayoutError
    for a teacher that cannot be cut over the ranks, CheckpointError for an output that exists.
    """
    run, ranks = request.run, all_ranks()
    checkpoint = agree(ranks, lambda: _checked_teacher(request))
    data = open_data(run, checkpoint.architecture)
    facts = on_first(ranks, lambda: _facts(request, data, checkpoint))
    with ExitStack() as stack:

        def open_first() -> Workspace | None:
            if ranks.rank:
                return None
            space = stack.enter_context(open_workspace(request.output, _key(facts, run, ranks.size)))
            stack.enter_context(space.recording())
            return space

        space, shards = agree(ranks, open_first), list(facts.shards())
        before = on_first(ranks, lambda: [] if space is None else sorted(space.done))
        left = [(name, numbers) for name, numbers in shards if name not in before]
        count = sum(len(numbers) for _, numbers in left)
        if not before:  # its error would discard them
            where = (len(left), str(request.output))
            needed = facts.sample_bytes * count
            on_first(ranks, lambda: None if space is None else check_disk(space.folder, needed, *where))
        teacher = agree(ranks, lambda: CachingTeacher(run, checkpoint, ranks))
        for number, (name, numbers) in enumerate(left, start=1):
            entries = _entries(teacher, data.train, numbers, facts, run.batch.micro_batch_size)
            on_first(ranks, partial(_write_shard, space, name, entries))
            report(len(before) + number, len(shards))
        on_first(ranks, lambda: None if space is None else space.publish(KIND, {"cache": facts.model_dump()}))
    tokens = count * facts.sequence_length
    flops = tokens * forward_flops_per_token(checkpoint.architecture, facts.sequence_length)
    return WrittenCache(facts, facts.samples * facts.sample_bytes, flops, len(before))


def join_ranks() -> None:
    """Join the other processes of a launch (torchrun, deepspeed), if there are any."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        initialize_distributed(ParallelLayout(tensor_parallel=size))


def _write_shard(space: Workspace | None, name: str, entries: dict[str, np.ndarray]) -> None:
    assert space is not None
    (space.folder / name).write_bytes(save(entries))  # save_file makes files that only their owner can read
    space.record(name, flushed_digest(space.folder / name))


def _checked_teacher(request: CacheRequest) -> LogicalCheckpoint:
    """The teacher of a request that can be cached. Every rank checks it by itself."""
    run = request.run
    check_cacheable(run, request.output)
    refuse_existing(request.output)
    check_writable(request.output.parent)
    assert run.distillation is not None
    checkpoint = open_described(Path(run.distillation.teacher))
    vocabulary = checkpoint.architecture.sizes["vocab"]
    if not 1 <= request.top_k <= vocabulary:
        raise ConfigError(f"--top-k {request.top_k}: expected 1 to {vocabulary}, the teacher's vocabulary.")
    return checkpoint


def _facts(request: CacheRequest, data: Data, checkpoint: LogicalCheckpoint) -> CacheFacts:
    """What the cache will belong to."""
    run = request.run
    return cache_facts(
        run,
        data,
        checkpoint,
        cached_samples(run, run.schedule.start_step, first_sample(run)),
        vocabulary=checkpoint.architecture.sizes["vocab"],
        top_k=request.top_k,
        stored=request.stored,
        shard_samples=request.shard_samples,
    )


def _key(facts: CacheFacts, run: RunSettings, num_ranks: int) -> str:
    """A hash of all that decides the bytes of a shard, down to its rounding."""
    content = [facts.model_dump(), run.model.attention, run.model.layer_kernels, run.batch.micro_batch_size, num_ranks]
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
    """The teacher of a run, as the run would build it, cut over the tensor ranks ``ranks``."""

    def __init__(self, run: RunSettings, checkpoint: LogicalCheckpoint, ranks: ProcessGroup = SINGLE_PROCESS) -> None:
        architecture: Architecture = checkpoint.architecture
        check_trainable(architecture)
        layout = ParallelLayout(tensor_parallel=ranks.size)
        check_layout(architecture, layout, f"{ranks.size} processes, each a tensor rank")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        check_attention(run.model.attention, self._device)
        check_capped_scores(run.model.attention, architecture)
        if run.model.layer_kernels == "liger":
            use_liger(architecture.family.model_type, self._device)
        factory = LayerFactory(
            architecture,
            TensorRanks(dist.group.WORLD if ranks.size > 1 else None, ranks.rank, ranks.size),
            CheckpointWeights(checkpoint),
            DTYPES[run.precision],
            self._device,
            run.model.attention,
        )
        self._teacher = Teacher(factory, layout, 0)
        self._softcap = architecture.logit_softcap
        self._vocabulary, self._num_ranks = architecture.sizes["vocab"], ranks.size
        self._bounds = split_bounds(self._vocabulary, ranks.size)[ranks.rank]  # of this rank's entries

    @torch.no_grad()
    def top_entries(self, input_ids: Tensor, top_k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """The ``top_k`` most probable entries at ``temperature`` for each token of ``input_ids`` [B, S], equal on all ranks.

        Returns indices, int64, and fp32 log-probabilities, [B, S, K] each, in falling order.
        """
        hidden = self._teacher.forward(input_ids.to(self._device))  # [B, S, H]
        head = self._teacher.head
        assert head is not None
        weight = head[: self._bounds[1] - self._bounds[0]].float()  # [V, H], this rank's V of the vocabulary
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
        if self._num_ranks > 1:
            return self._of_all_ranks(logits / temperature, top_k)
        log_probs, indices = torch.log_softmax(logits / temperature, dim=-1).topk(top_k)
        return log_probs, indices

    def _of_all_ranks(self, scaled: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities and indices, [C, K] each, from ``scaled`` [C, V], this rank's part of the logits.

        The most probable entries of all are among the most probable ones of each rank.
        """
        width = min(top_k, -(-self._vocabulary // self._num_ranks))  # the first rank has the most entries
        values, columns = scaled.topk(min(width, scaled.shape[1]))
        missing = (0, width - values.shape[1])
        values, columns = pad(values, missing, value=-torch.inf), pad(columns + self._bounds[0], missing)
        totals, values, indices = (
            _gathered(part, self._num_ranks) for part in (scaled.logsumexp(dim=-1, keepdim=True), values, columns)
        )
        best, at = values.topk(top_k)
        return best - totals.logsumexp(dim=-1, keepdim=True), indices.gather(1, at)


def _gathered(part: Tensor, num_ranks: int) -> Tensor:
    """The parts [C, N] of all ranks side by side."""
    found = [torch.empty_like(part) for _ in range(num_ranks)]
    dist.all_gather(found, part.contiguous())
    return torch.cat(found, dim=1)


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
