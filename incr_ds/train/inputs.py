"""Opens a run's data: data sets, which all ranks describe together once, and the samples drawn from them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import Architecture, check_context
from incr_ds.checkpoint.publish import write_atomically
from incr_ds.config.json_file import read_json
from incr_ds.config.training import RunSettings
from incr_ds.data.fingerprint import (
    DataSet,
    TokenChunk,
    combine,
    num_chunks,
    record_of,
    recorded,
    scan_chunk,
)
from incr_ds.data.index_file import DataIndex, open_index
from incr_ds.data.mixture import CorpusUse, PastMix, corpus_uses
from incr_ds.data.samples import Samples, open_held_out_data, open_training_data
from incr_ds.errors import CheckpointError
from incr_ds.train.ranks import all_ranks, on_every_rank, on_rank_zero

CACHE, RECORD = "data_index", "data_sets.json"
# Chunks (64 MiB each) between two exchanges: no rank may wait for long in a collective operation.
CHUNKS_AT_ONCE = 16


@dataclass(frozen=True)
class Data:
    """Training samples and held-out samples by name, and the fingerprint of every data set by its prefix.

    ``uses`` says how much of each corpus the run reads. ``past`` lists the mixes that it has read before this one.
    """

    train: Samples
    held_out: dict[str, Samples]
    fingerprints: dict[str, str]
    uses: tuple[CorpusUse, ...] = ()
    past: tuple[PastMix, ...] = ()


def open_data(run: RunSettings, architecture: Architecture, saved: Mapping[str, Any] | None = None) -> Data:
    """Open the run's data on every rank. Rank 0 builds the shuffled indices.

    ``saved`` holds the facts of the checkpoint from which the run resumes. Raises ConfigError for missing or damaged files,
    too few held-out samples, and tokens outside the vocabulary.
    """
    check_context(architecture, run.batch.sequence_length, "batch.sequence_length")
    sets = describe_together(prefixes_of(run), Path(run.output) / CACHE)
    for data in sets.values():
        data.check_tokens(architecture.sizes["vocab"])
    past = () if saved is None else _past_mixes(run, sets, saved)
    on_rank_zero(lambda: _opened(run, sets, past, builds_index=True) and None)
    train, held_out = _opened(run, sets, past, builds_index=False)
    fingerprints = {prefix: data.fingerprint for prefix, data in sets.items()}
    uses = corpus_uses(run, {prefix: data.tokens for prefix, data in sets.items()})
    return Data(train, held_out, fingerprints, tuple(uses), past)


def prefixes_of(run: RunSettings) -> list[str]:
    """Every data set that the run reads, without duplicates."""
    held_out = run.data.held_out.values() if run.evaluation else []
    return list(dict.fromkeys([*(corpus.prefix for corpus in run.data.train), *held_out]))


def describe_together(prefixes: list[str], cache: Path) -> dict[str, DataSet]:
    """The data sets by prefix, from the record in ``cache`` if no file changed, otherwise read by all ranks together."""
    known = on_rank_zero(lambda: recorded(_record(cache / RECORD), _opened_indices(prefixes)))
    missing = [prefix for prefix in prefixes if prefix not in known]
    if missing:
        known |= {prefix: _described(open_index(prefix)) for prefix in missing}
        on_rank_zero(lambda: _write_record(cache / RECORD, known))
    return {prefix: known[prefix] for prefix in prefixes}


def _opened_indices(prefixes: list[str]) -> list[str]:
    """Check each index's header, so that missing files are reported before anything is read. Returns the prefixes."""
    return [open_index(prefix).prefix for prefix in prefixes]


def _described(index: DataIndex) -> DataSet:
    chunks: list[TokenChunk] = []
    total, at_once = num_chunks(index), CHUNKS_AT_ONCE * all_ranks().size
    for first in range(0, total, at_once):
        chunks += _scanned(index, range(first, min(first + at_once, total)))
    return on_rank_zero(lambda: combine(index, chunks))


def _scanned(index: DataIndex, numbers: range) -> list[TokenChunk]:
    """Read the chunks with these numbers, each on one rank."""
    ranks = all_ranks()
    mine = on_every_rank(
        lambda: {number: scan_chunk(index, number) for number in numbers[ranks.rank :: ranks.size]},
        f"{index.prefix}.bin: reading failed",
        "Check that all ranks can read the file.",
    )
    found = {number: chunk for share in ranks.gather(mine) for number, chunk in share.items()}
    return [found[number] for number in numbers]


def _record(path: Path) -> dict[str, Any]:
    """Read the record. A damaged one counts as missing, and the data is read again."""
    if path.is_file():
        with suppress(CheckpointError):
            return read_json(path, CheckpointError)
    return {}


def _write_record(path: Path, sets: Mapping[str, DataSet]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record_of(sets.values()), indent=1) + "\n")


def _past_mixes(run: RunSettings, sets: Mapping[str, DataSet], saved: Mapping[str, Any]) -> tuple[PastMix, ...]:
    """The mixes that a checkpoint's run has read, with its last one if this run has another and may have it."""
    past = tuple(
        PastMix(mix["until"], tuple((fingerprint, weight) for fingerprint, weight in mix["corpora"]))
        for mix in saved.get("past_mixes", [])
    )
    if not run.resume.change_data:
        return past
    was = tuple((saved["data"][corpus["prefix"]], corpus["weight"]) for corpus in saved["settings"]["data"]["train"])
    now = tuple((sets[corpus.prefix].fingerprint, corpus.weight) for corpus in run.data.train)
    if was == now:
        return past
    return (
        *past,
        PastMix(run.data.start_sample + saved["position"]["consumed_samples"] + saved.get("skipped_samples", 0), was),
    )


def _opened(
    run: RunSettings, sets: Mapping[str, DataSet], past: tuple[PastMix, ...], *, builds_index: bool
) -> tuple[Samples, dict[str, Samples]]:
    cache, length = Path(run.output) / CACHE, run.batch.sequence_length
    size = run.data.start_sample + run.batch.samples_between(0, run.schedule.train_steps)
    mix = [(sets[corpus.prefix], corpus.weight) for corpus in run.data.train]
    trained = open_training_data(mix, length, run.seed, cache, size, past=past, builds_index=builds_index)
    if run.evaluation is None:
        return trained, {}
    opened = partial(open_held_out_data, sequence_length=length, cache=cache, num_samples=run.evaluation.samples)
    held_out = run.data.held_out.items()
    return trained, {name: opened(sets[prefix], builds_index=builds_index) for name, prefix in held_out}
