"""How much of each corpus a run reads, and how a run goes on whose mix of corpora has changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from incr_ds.config.training import RunSettings


@dataclass(frozen=True)
class CorpusUse:
    """A run's use of one corpus: its share of the samples, the samples of one epoch, and the epochs that the run reads."""

    prefix: str
    share: float
    samples_per_epoch: int
    epochs: float

    def __str__(self) -> str:
        read = f"{self.epochs:.2f} epochs of {self.samples_per_epoch:,} samples"
        return f"data: {self.prefix}: {self.share:.1%} of the samples, {read}"


def corpus_uses(run: RunSettings, tokens: Mapping[str, int]) -> Iterator[CorpusUse]:
    """What the steps of ``run`` read of each corpus whose number of tokens is known, by its share of the samples."""
    total = sum(corpus.weight for corpus in run.data.train)
    read = run.batch.samples_between(run.schedule.start_step, run.schedule.last_step)
    for corpus in run.data.train:
        samples = (tokens.get(corpus.prefix, 0) - 1) // run.batch.sequence_length
        if samples > 0:
            share = corpus.weight / total
            yield CorpusUse(corpus.prefix, share, samples, share * read / samples)


@dataclass(frozen=True)
class PastMix:
    """A mix that a run has read up to sample ``until``: the fingerprint and weight of each corpus."""

    until: int
    corpora: tuple[tuple[str, float], ...]


def blended(weights: Sequence[float], size: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of the corpus of each sample (int16 [size]), and of the sample in it (int64 [size]).

    The rule is megatron-core's: each sample comes from the corpus that is furthest behind its share. It is greedy, so a longer
    mix starts with the same samples.
    """
    from incr_ds.data.megatron import build_blending_indices

    corpus, number = np.zeros(size, np.int16), np.zeros(size, np.int64)
    shares = np.array([weight / sum(weights) for weight in weights])
    build_blending_indices(corpus, number, shares, len(weights), size, False)
    return corpus, number


def samples_read(past: Sequence[PastMix]) -> tuple[int, dict[str, int]]:
    """Where the last of these mixes ended, and how many samples of each corpus (by fingerprint) were read until there.

    A corpus goes on in the next mix where it stood in this one.
    """
    first, read = 0, dict[str, int]()
    for mix in past:
        corpus, _ = blended([weight for _, weight in mix.corpora], mix.until - first)
        counts = np.bincount(corpus, minlength=len(mix.corpora)).tolist()
        now = [
            (fingerprint, read.get(fingerprint, 0) + count)
            for (fingerprint, _), count in zip(mix.corpora, counts, strict=True)
        ]
        for fingerprint, count in now:
            read[fingerprint] = max(count, read.get(fingerprint, 0))
        first = mix.until
    return first, read
