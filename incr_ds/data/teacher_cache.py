"""A teacher's cache: its most probable entries for each token of a run's samples, computed once (docs/distillation.md).

    shard_00000000.safetensors   indices [N, S, K], the smallest unsigned type for the vocabulary; log_probs [N, S, K]
    manifest.json                size and checksum of every shard; ``cache``: what the entries belong to

Samples are numbered as in incr_ds.data.samples. A shard holds N of them, the last one perhaps fewer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from incr_ds.checkpoint.publish import read_manifest
from incr_ds.config.fields import Seed, Settings
from incr_ds.errors import CheckpointError, ConfigError

KIND = "teacher cache"
STORED: dict[str, np.dtype[Any]] = {"fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
INDICES, LOG_PROBS = "indices", "log_probs"
Count = Annotated[int, Field(ge=1)]


class CachedCorpus(Settings):
    """A data set of the mix: the fingerprint of its tokens, and its weight."""

    fingerprint: str
    weight: float


class CacheFacts(Settings):
    """What a cache belongs to, and how it is stored.

    ``teacher`` is the folder that it was read from, and ``teacher_checksum`` its content. The cache holds ``samples``
    samples from the number ``first_sample`` on, ``shard_samples`` in a shard. ``log_probs`` are at ``temperature``, stored
    in ``stored`` and computed by a teacher in ``precision``.
    """

    teacher: str
    teacher_checksum: str
    corpora: list[CachedCorpus]
    seed: Seed
    sequence_length: Count
    first_sample: int = Field(ge=0)
    samples: Count
    shard_samples: Count
    vocabulary: Count
    top_k: Count
    temperature: float = Field(gt=0.0)
    precision: Literal["fp32", "bf16", "fp16"]
    stored: Literal["fp16", "fp32"]

    @property
    def numbers(self) -> range:
        """Numbers of the samples in the cache."""
        return range(self.first_sample, self.first_sample + self.samples)

    @property
    def index_dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every entry of the vocabulary."""
        return np.min_scalar_type(self.vocabulary - 1)

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample."""
        return self.sequence_length * self.top_k * (self.index_dtype.itemsize + STORED[self.stored].itemsize)

    def shards(self) -> Iterator[tuple[str, range]]:
        """The file of every shard, and the numbers of its samples."""
        for start in range(self.first_sample, self.numbers.stop, self.shard_samples):
            yield (
                _shard_name(start - self.first_sample),
                range(start, min(start + self.shard_samples, self.numbers.stop)),
            )


def _shard_name(first: int) -> str:
    return f"shard_{first:08d}.safetensors"


_FACTS = TypeAdapter(CacheFacts)


def read_facts(folder: Path) -> CacheFacts:
    """The facts of a published cache. Raises CheckpointError if the folder is something else."""
    content = read_manifest(folder)
    if content["kind"] != KIND:
        raise CheckpointError(
            f"{folder}: expected a {KIND} that tools/cache_teacher.py wrote, found a {content['kind']}; name another folder."
        )
    try:
        return _FACTS.validate_json(json.dumps(content["facts"].get("cache")))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(["cache", *(str(key) for key in first["loc"])])
        raise CheckpointError(
            f"{folder}: facts.{where} of its manifest: {first['msg']}: not what incr_ds writes there; write the cache again."
        ) from error


def check_cache(folder: Path, found: CacheFacts, run: CacheFacts, needed: range) -> None:
    """Raise ConfigError that lists what ``found`` in ``folder`` was made for and the run does not have.

    ``run`` are the facts that a cache for the run would have, and ``needed`` the samples that it still has to read.
    """
    belongs = {
        "teacher_checksum": "distillation.teacher",
        "vocabulary": "the model's vocabulary",
        "corpora": "data.train",
        "seed": "seed",
        "sequence_length": "batch.sequence_length",
        "temperature": "distillation.temperature",
    }
    problems = [
        f"{key}: the cache is of {_shown(getattr(found, name))}, the run has {_shown(getattr(run, name))}"
        for name, key in belongs.items()
        if getattr(found, name) != getattr(run, name)
    ]
    if needed and not (needed.start in found.numbers and needed[-1] in found.numbers):
        problems.append(
            f"samples: the cache has {found.numbers.start} to {found.numbers[-1]}, the run reads {needed.start} to {needed[-1]} "
            "while its teacher counts"
        )
    if problems:
        raise ConfigError(
            f"distillation.cache {folder}: it belongs to another run:\n  " + "\n  ".join(problems) + "\n"
            "Write one for this run file (tools/cache_teacher.py), restore these settings, or remove distillation.cache."
        )


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{corpus.fingerprint} (weight {corpus.weight:g})" for corpus in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


class TeacherCache:
    """Reads a published cache, whose files were verified, for the samples ``needed``."""

    def __init__(self, folder: Path, facts: CacheFacts, needed: range) -> None:
        self.folder, self.facts, self._needed = folder, facts, needed
        self._opened: tuple[str, Any] | None = None

    def entries(self, numbers: range) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Indices, int64, and log-probabilities of samples, [B, S, K] each; None behind the last sample that is taught.

        Raises CheckpointError for entries outside the vocabulary, and for log-probabilities that cannot be.
        """
        if numbers.start >= self._needed.stop:
            return None
        rows = [self._sample(number) for number in numbers]
        indices = torch.from_numpy(np.stack([row[0] for row in rows]).astype(np.int64))  # [B, S, K]
        log_probs = torch.from_numpy(np.stack([row[1] for row in rows]))  # [B, S, K]
        if int(indices.max()) >= self.facts.vocabulary or not bool(((log_probs <= 0) & log_probs.isfinite()).all()):
            raise CheckpointError(
                f"{self.folder}: samples {numbers.start} to {numbers[-1]}: expected entries of {self.facts.vocabulary} and "
                "finite log-probabilities of at most 0, found others; write the cache again."
            )
        return indices, log_probs

    def _sample(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        shard, row = divmod(number - self.facts.first_sample, self.facts.shard_samples)
        handle = self._shard(shard * self.facts.shard_samples)
        return handle.get_slice(INDICES)[row], handle.get_slice(LOG_PROBS)[row]

    def _shard(self, first: int) -> Any:
        """The open shard, whose first sample has the number ``first`` within the cache. Samples are read in order."""
        name = _shard_name(first)
        if self._opened is None or self._opened[0] != name:
            path = self.folder / name
            try:
                handle: Any = safe_open(path, framework="numpy")
                found = [_described(handle.get_slice(part)) for part in (INDICES, LOG_PROBS)]
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not readable as a shard ({error}); write the cache again.") from error
            expected = self._expected(first)
            if found != expected:
                raise CheckpointError(f"{path}: expected {expected}, found {found}; write the cache again.")
            self._opened = name, handle
        return self._opened[1]

    def _expected(self, first: int) -> list[tuple[str, list[int]]]:
        facts = self.facts
        shape = [min(facts.shard_samples, facts.samples - first), facts.sequence_length, facts.top_k]
        return [(f"U{8 * facts.index_dtype.itemsize}", shape), (f"F{8 * STORED[facts.stored].itemsize}", shape)]


def _described(part: Any) -> tuple[str, list[int]]:
    return part.get_dtype(), list(part.get_shape())
