"""The teacher's cache of a run: what it must belong to, and which of its samples the run reads."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import xxhash

from incr_ds.checkpoint.base import LogicalCheckpoint
from incr_ds.checkpoint.publish import MANIFEST, hash_file, read_manifest
from incr_ds.config.training import RunSettings
from incr_ds.data.teacher_cache import CachedCorpus, CacheFacts, TeacherCache, check_cache, read_facts
from incr_ds.errors import ConfigError
from incr_ds.launch.dry_run import taught_steps
from incr_ds.train.hashing import verify_together
from incr_ds.train.inputs import Data
from incr_ds.train.ranks import on_rank_zero

SHARD_BYTES = 256 << 20  # about as much work as an interrupted command repeats


def first_sample(run: RunSettings) -> int:
    """The number of the first sample that the run reads."""
    return run.data.start_sample + run.batch.samples_between(0, run.schedule.start_step)


def cached_samples(run: RunSettings, step: int, first: int) -> range:
    """The samples that the run reads while its teacher counts, from ``step`` on, whose first sample is ``first``."""
    return range(first, first + run.batch.samples_between(step, run.schedule.start_step + taught_steps(run)))


def cache_facts(
    run: RunSettings,
    data: Data,
    teacher: LogicalCheckpoint,
    samples: range,
    *,
    vocabulary: int,
    top_k: int,
    stored: Literal["fp16", "fp32"],
    shard_samples: int | None = None,
) -> CacheFacts:
    """The facts of a cache of ``samples`` for ``run``. Without ``shard_samples`` a shard has about SHARD_BYTES."""
    assert run.distillation is not None
    facts = CacheFacts(
        teacher=run.distillation.teacher,
        teacher_checksum=teacher_checksum(teacher),
        corpora=[
            CachedCorpus(fingerprint=data.fingerprints[corpus.prefix], weight=corpus.weight)
            for corpus in run.data.train
        ],
        seed=run.seed,
        sequence_length=run.batch.sequence_length,
        first_sample=samples.start,
        samples=len(samples),
        shard_samples=shard_samples or 1,
        vocabulary=vocabulary,
        top_k=top_k,
        temperature=run.distillation.temperature,
        precision=run.precision,
        stored=stored,
    )
    fitting = max(1, SHARD_BYTES // facts.sample_bytes)
    return facts if shard_samples else facts.model_copy(update={"shard_samples": fitting})


def teacher_checksum(teacher: LogicalCheckpoint) -> str:
    """A checksum of the teacher's content: that of its manifest or, without one, of all of its files."""
    folder = teacher.facts.path
    if (folder / MANIFEST).is_file():
        return str(read_manifest(folder)["checksum"])
    digest = xxhash.xxh3_128()
    for path in sorted({*teacher.facts.files, folder / "config.json"}):
        digest.update(f"{path.name} {hash_file(path)}\n".encode())
    return digest.hexdigest()


def open_cache(
    run: RunSettings, data: Data, teacher: LogicalCheckpoint, vocabulary: int, needed: range
) -> TeacherCache:
    """Open ``run.distillation.cache`` for the samples ``needed``. All ranks call this, and share the work of verifying it.

    Raises ConfigError on all ranks for a cache that belongs to another run, and CheckpointError for a damaged one.
    """
    assert run.distillation is not None and run.distillation.cache is not None
    folder = Path(run.distillation.cache)

    def checked() -> CacheFacts:
        if not folder.is_dir():
            raise ConfigError(f"distillation.cache: {folder}: no such folder; tools/cache_teacher.py writes it.")
        found = read_facts(folder)
        ours = cache_facts(
            run, data, teacher, needed or range(1), vocabulary=vocabulary, top_k=found.top_k, stored=found.stored
        )
        check_cache(folder, found, ours, needed)
        return found

    found = on_rank_zero(checked)
    verify_together(folder)
    return TeacherCache(folder, found, needed)
