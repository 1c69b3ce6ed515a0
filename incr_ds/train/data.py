"""Token batches from Megatron .bin/.idx files, in an order that is a function of the seed and the sample number alone.

Sample i of a run is the same tokens whatever the number of ranks, the micro-batch, the length of the run or where it
was resumed; step k of a run trains on samples start_sample + [k * G, (k + 1) * G) with G = global_batch_size.

Within one corpus, epoch 0 is megatron-core's own shuffled order of one pass; later epochs go through the same samples
in other permutations. A pass ends with its last whole sample. Corpora are mixed by megatron-core's blending rule.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash

from incr_ds.config.training import BatchSettings, CorpusSettings
from incr_ds.errors import ConfigError

SCAN_TOKENS = 1 << 24
# Magic, version, type code, number of sequences, number of document starts.
INDEX_HEADER, INDEX_MAGIC = struct.Struct("<9sQBQQ"), b"MMIDIDX\0\0"
# Held-out samples do not depend on the run's seed, so that runs can be compared.
HELD_OUT_SEED = 0


class Samples(Protocol):
    """Numbered token sequences of one length."""

    def tokens(self, number: int) -> np.ndarray:
        """Sample ``number``: int64 [sequence_length + 1]; inputs are all but the last, labels all but the first."""
        ...


@dataclass(frozen=True)
class _Description:
    """What GPTDataset asks of a tokenizer when documents are not masked: nothing but an identity.

    ``eod`` differs from its padding id, -1, which occurs in no data.
    """

    vocab_size: None = None
    eod: int = -2

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": "tokens as they are"}


class Corpus:
    """One Megatron data set as an endless sequence of samples."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed
        self._epoch, self._order = 0, np.arange(len(dataset))

    @property
    def samples_per_epoch(self) -> int:
        """Whole samples of one pass."""
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
    """Corpora mixed by weight: sample i comes from the corpus that is furthest behind its share."""

    def __init__(self, corpora: Sequence[Corpus], weights: Sequence[float], size: int) -> None:
        from incr_ds.train.megatron import build_blending_indices

        self._corpora = corpora
        self._corpus, self._number = np.zeros(size, np.int16), np.zeros(size, np.int64)
        shares = [weight / sum(weights) for weight in weights]
        # The rule is greedy, so a longer run begins with the same samples.
        build_blending_indices(self._corpus, self._number, np.array(shares), len(corpora), size, False)

    def tokens(self, number: int) -> np.ndarray:
        """Sample ``number``: int64 [sequence_length + 1]."""
        return self._corpora[self._corpus[number]].tokens(int(self._number[number]))


def open_corpus(prefix: str, sequence_length: int, seed: int, cache: Path, *, builds_index: bool = True) -> Corpus:
    """Open PREFIX.bin/.idx; the shuffled index is kept in ``cache`` under the data's fingerprint.

    One process must call with ``builds_index`` and finish before the others call without. Raises ConfigError if the
    files are missing or hold less than one sample.
    """
    check_data_files(prefix)
    folder = cache / data_fingerprint(prefix)[:16] / f"{sequence_length}-{seed}"
    if builds_index and not folder.is_dir():
        _build_index(prefix, sequence_length, seed, folder)
    dataset = _gpt_dataset(prefix, sequence_length, seed, folder)
    if len(dataset) < 1:
        raise ConfigError(
            f"{prefix}.bin: {_num_tokens(dataset.dataset)} tokens, less than one sample of sequence_length "
            f"{sequence_length} + 1."
        )
    return Corpus(dataset, seed)


def open_training_data(
    train: Sequence[CorpusSettings],
    sequence_length: int,
    seed: int,
    cache: Path,
    size: int,
    *,
    builds_index: bool = True,
) -> Samples:
    """The training mix; ``size`` is the number of samples that the run may ask for, its start_sample included."""
    corpora = [open_corpus(c.prefix, sequence_length, seed, cache, builds_index=builds_index) for c in train]
    if len(corpora) == 1:
        return corpora[0]
    return Blend(corpora, [item.weight for item in train], size)


def open_held_out_data(
    prefix: str, sequence_length: int, cache: Path, num_samples: int, *, builds_index: bool = True
) -> Samples:
    """Held-out data with at least ``num_samples`` different samples, else ConfigError."""
    corpus = open_corpus(prefix, sequence_length, HELD_OUT_SEED, cache, builds_index=builds_index)
    if num_samples > corpus.samples_per_epoch:
        raise ConfigError(
            f"evaluation.samples {num_samples}: {prefix}.bin has {corpus.samples_per_epoch} samples of "
            f"sequence_length {sequence_length}; lower it."
        )
    return corpus


def batches(
    samples: Samples, first_sample: int, batch: BatchSettings, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Micro-batches (input_ids, labels), each int64 [micro_batch_size, sequence_length], without end.

    ``first_sample`` is a multiple of the global batch past the run's start. Each global batch is cut into one
    contiguous share per data-parallel rank, each share into micro-batches.
    """
    share = batch.global_batch_size // data_parallel_size
    start = first_sample + data_parallel_rank * share
    while True:
        for offset in range(0, share, batch.micro_batch_size):
            yield _stack(samples, range(start + offset, start + offset + batch.micro_batch_size))
        start += batch.global_batch_size


def held_out_batches(
    samples: Samples, num_samples: int, batch: BatchSettings, data_parallel_rank: int, data_parallel_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same ``num_samples`` first samples at every call, shared over the data-parallel ranks in micro-batches."""
    share = num_samples // data_parallel_size
    start = data_parallel_rank * share
    for offset in range(0, share, batch.micro_batch_size):
        yield _stack(samples, range(start + offset, start + offset + batch.micro_batch_size))


def data_fingerprint(prefix: str) -> str:
    """Fingerprint of a data set: xxh3 of its index file and the size of its data file."""
    digest = xxhash.xxh3_128()
    with open(prefix + ".idx", "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    digest.update(str(os.path.getsize(prefix + ".bin")).encode())
    return digest.hexdigest()


def largest_token(prefix: str) -> int:
    """The largest token id of a data set, by one pass over its data file."""
    tokens = np.memmap(prefix + ".bin", dtype=open_indexed(prefix).index.dtype, mode="r")
    return max(int(tokens[start : start + SCAN_TOKENS].max()) for start in range(0, len(tokens), SCAN_TOKENS))


def check_vocabulary(prefix: str, vocabulary_size: int) -> None:
    """Raise ConfigError if the data holds a token id that the model has no embedding for."""
    largest = largest_token(prefix)
    if largest >= vocabulary_size:
        raise ConfigError(
            f"{prefix}.bin: token id {largest} does not fit the model's vocab_size {vocabulary_size}; prepare the data "
            "with the model's tokenizer, or give the model a larger vocabulary."
        )


def check_data_files(prefix: str) -> None:
    """Raise ConfigError unless PREFIX.bin and PREFIX.idx are there, readable and of one size."""
    for ending in (".bin", ".idx"):
        if not Path(prefix + ending).is_file():
            raise ConfigError(
                f"{prefix}{ending}: no such file; expected the path of a Megatron data set without its ending "
                "(tools/prepare_data.py makes one)."
            )
    indexed = open_indexed(prefix)
    expected, found = _num_tokens(indexed) * indexed.index.dtype_size, os.path.getsize(prefix + ".bin")
    if expected != found:
        raise ConfigError(f"{prefix}.bin: {found} bytes, its .idx describes {expected}; prepare the data again.")


def _num_tokens(indexed: Any) -> int:
    # Takes the data set and not its prefix: the lengths lie in a file mapping that dies with it.
    return int(indexed.sequence_lengths.sum(dtype=np.int64))


def open_indexed(prefix: str) -> Any:
    """megatron-core's view of PREFIX.bin and .idx: item i is document i. ConfigError if the index is not one."""
    from incr_ds.train.megatron import IndexedDataset

    _check_index(Path(prefix + ".idx"))
    return IndexedDataset(prefix, mmap=True)


def _check_index(path: Path) -> None:
    """Header and size, before megatron-core maps the file."""
    with open(path, "rb") as stream:
        header = stream.read(INDEX_HEADER.size)
    if len(header) < INDEX_HEADER.size or (fields := INDEX_HEADER.unpack(header))[:2] != (INDEX_MAGIC, 1):
        raise ConfigError(f"{path}: not a Megatron index file of version 1; prepare the data again.")
    *_, sequences, documents = fields
    expected, found = INDEX_HEADER.size + sequences * (4 + 8) + documents * 8, path.stat().st_size
    if expected != found:
        raise ConfigError(f"{path}: {found} bytes, its header describes {expected}; prepare the data again.")


def _gpt_dataset(prefix: str, sequence_length: int, seed: int, folder: Path) -> Any:
    from incr_ds.train.megatron import GPTDataset, GPTDatasetConfig, Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(folder),
        tokenizer=_Description(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = open_indexed(prefix)
    every = np.arange(len(indexed), dtype=np.int32)
    # The name in place of the path: the cached index belongs to the data, wherever it lies.
    return GPTDataset(indexed, Path(prefix).name, every, None, Split.train, config)


def _build_index(prefix: str, sequence_length: int, seed: int, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _gpt_dataset(prefix, sequence_length, seed, work)
        os.rename(work, folder)
    except OSError:
        if not folder.is_dir():  # unless another run built it meanwhile
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _stack(samples: Samples, numbers: range) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(np.stack([samples.tokens(number) for number in numbers]).astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
