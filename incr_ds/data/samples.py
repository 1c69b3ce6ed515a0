"""Token batches from Megatron .bin/.idx files, in an order that depends only on the seed and the sample number.

Sample i of a run is the same for any number of ranks, micro-batch size and run length, resumed or not. Step k of a run
trains on samples start_sample + [k * G, (k + 1) * G) with G = global_batch_size. With batch.ramp, k * G is the sum of the
batches of the k steps before it.

Within one corpus, epoch 0 is megatron-core's own shuffled order of one pass. Later epochs go through the same samples
in other permutations. A pass ends with its last whole sample. Corpora are mixed by megatron-core's blending rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from incr_ds.config.batch import BatchSettings
from incr_ds.data.fingerprint import DataSet
from incr_ds.data.mixture import PastMix, blended, samples_read
from incr_ds.data.sample_index import open_samples, ready_index
from incr_ds.data.targets import Entries, Targets
from incr_ds.errors import ConfigError

# Held-out samples do not depend on the run's seed, so that runs can be compared.
HELD_OUT_SEED = 0


class Samples(Protocol):
    """Numbered token sequences of one length."""

    def tokens(self, number: int) -> np.ndarray:
        """Sample ``number``: int64 [sequence_length + 1]. Inputs are all but the last, labels all but the first."""
        ...


class Corpus:
    """One Megatron data set as an endless sequence of samples."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._epoch, self._order = 0, np.arange(len(dataset))

    @property
    def samples_per_epoch(self) -> int:
        """Number of whole samples in one pass."""
        return len(self._dataset)

    def tokens(self, number: int) -> np.ndarray:
        """Sample ``number``: int64 [sequence_length + 1]."""
        epoch, index = divmod(number, self.samples_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        sample = self._dataset[int(self._order[index])]
        return np.concatenate([sample["tokens"].numpy(), sample["labels"][-1:].numpy()])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch == 0:
            return np.arange(self.samples_per_epoch)
        return np.random.default_rng((self._seed, epoch)).permutation(self.samples_per_epoch)


class Blend:
    """Corpora mixed by weight, from sample ``first`` up to ``size``. Corpus k starts at its sample ``starts[k]``."""

    def __init__(
        self, corpora: Sequence[Corpus], weights: Sequence[float], size: int, first: int = 0, starts: Sequence[int] = ()
    ) -> None:
        self._corpora, self._weights, self._first = corpora, weights, first
        self._starts = starts or [0] * len(corpora)
        self._corpus, self._number = blended(weights, size - first)

    def tokens(self, number: int) -> np.ndarray:
        """Sample ``number``, which is not before the first: int64 [sequence_length + 1]."""
        assert number >= self._first
        number -= self._first
        if number >= len(self._corpus):  # a run that skips samples reads past its own number
            self._corpus, self._number = blended(self._weights, max(number + 1, 2 * len(self._corpus)))
        corpus = int(self._corpus[number])
        return self._corpora[corpus].tokens(self._starts[corpus] + int(self._number[number]))


def open_corpus(data: DataSet, sequence_length: int, seed: int, cache: Path, *, builds_index: bool = True) -> Corpus:
    """Open a data set. Its shuffled index is kept in ``cache``, under the fingerprint of the content.

    One process must call with ``builds_index`` and finish before the others call without it. It builds the index if there
    is none or the stored one is damaged. Raises ConfigError if the data holds less than one sample.
    """
    folder = cache / data.fingerprint[:16] / f"{sequence_length}-{seed}"
    if builds_index:
        ready_index(data.prefix, sequence_length, seed, folder)
    dataset = open_samples(data.prefix, sequence_length, seed, folder)
    if len(dataset) < 1:
        raise ConfigError(
            f"{data.prefix}.bin: {data.tokens} tokens, fewer than one sample of sequence_length {sequence_length} + 1."
        )
    return Corpus(dataset, seed)


def open_training_data(
    train: Sequence[tuple[DataSet, float]],
    sequence_length: int,
    seed: int,
    cache: Path,
    size: int,
    *,
    past: Sequence[PastMix] = (),
    builds_index: bool = True,
) -> Samples:
    """The training mix of data sets by weight.

    ``size`` is the number of samples that the run may need, including those before its start_sample. ``past`` lists the mixes
    that the run has read before this one. This one begins where the last of them ended.
    """
    corpora = [open_corpus(data, sequence_length, seed, cache, builds_index=builds_index) for data, _ in train]
    if len(corpora) == 1 and not past:
        return corpora[0]
    first, read = samples_read(past)
    starts = [read.get(data.fingerprint, 0) for data, _ in train]
    return Blend(corpora, [weight for _, weight in train], max(size, first), first, starts)


def open_held_out_data(
    data: DataSet, sequence_length: int, cache: Path, num_samples: int, *, builds_index: bool = True
) -> Samples:
    """Held-out data with at least ``num_samples`` different samples. Raises ConfigError if there are fewer."""
    corpus = open_corpus(data, sequence_length, HELD_OUT_SEED, cache, builds_index=builds_index)
    if num_samples > corpus.samples_per_epoch:
        raise ConfigError(
            f"evaluation.samples {num_samples}: {data.prefix}.bin has {corpus.samples_per_epoch} samples of "
            f"sequence_length {sequence_length}; lower it."
        )
    return corpus


def batches(
    samples: Samples,
    first_sample: int,
    batch: BatchSettings,
    data_parallel_rank: int,
    data_parallel_size: int,
    cache: Entries | None = None,
    step: int = 0,
) -> Iterator[tuple[torch.Tensor, Targets]]:
    """Yield micro-batches (input_ids, labels), each int64 [micro_batch_size, sequence_length], without end.

    With a ``cache``, the labels of samples that it teaches come with the teacher's indices and log-probabilities, each
    [micro_batch_size, sequence_length, K].

    ``first_sample`` is the first that optimizer step number ``step`` of the schedule reads. Each global batch is cut into one
    contiguous share per data-parallel rank, and each share into micro-batches.
    """
    for size in map(batch.size_at, count(step)):
        share = size // data_parallel_size
        start = first_sample + data_parallel_rank * share
        for offset in range(0, share, batch.micro_batch_size):
            numbers = range(start + offset, start + offset + batch.micro_batch_size)
            input_ids, labels = _stack(samples, numbers)
            entries = None if cache is None else cache.entries(numbers)
            yield input_ids, labels if entries is None else (labels, *entries)
        first_sample += size


def held_out_batches(
    samples: Samples, num_samples: int, batch: BatchSettings, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the first ``num_samples`` samples, the same at every call, split over data-parallel ranks and micro-batches."""
    share = num_samples // data_parallel_size
    start = data_parallel_rank * share
    for offset in range(0, share, batch.micro_batch_size):
        yield _stack(samples, range(start + offset, start + offset + batch.micro_batch_size))


def _stack(samples: Samples, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
    # rows: [B, S + 1]
    rows = torch.from_numpy(np.stack([samples.tokens(number) for number in numbers]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # [B, S] each
