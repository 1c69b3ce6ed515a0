"""Order of samples: expected token values are worked out from the documents, not from the code under test."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from token_data import write_documents

from incr_ds.checkpoint.publish import seal
from incr_ds.config.batch import BatchSettings
from incr_ds.data.fingerprint import describe
from incr_ds.data.samples import (
    Blend,
    batches,
    held_out_batches,
    open_corpus,
    open_held_out_data,
    open_training_data,
)
from incr_ds.errors import ConfigError

LENGTH = 7
TOKENS = 500


def write_data(prefix, first=0, count=TOKENS, cut=31):
    """Documents of ``cut`` tokens; token values count up from ``first``, so a sample shows where it lies."""
    starts = range(0, count, cut)
    return write_documents(prefix, (list(range(first + start, first + min(start + cut, count))) for start in starts))


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder / "a")
    write_data(folder / "b", first=10000)
    return folder


def corpus(folder, seed=3, name="a"):
    return open_corpus(describe(str(folder / name)), LENGTH, seed, folder / "cache")


def first_column(feed, count):
    return torch.cat([inputs[:, 0] for inputs, _ in islice(feed, count)]).tolist()


def test_an_epoch_has_every_token_once_and_labels_are_the_next_tokens(corpus_folder):
    samples = corpus(corpus_folder)
    assert samples.samples_per_epoch == (TOKENS - 1) // LENGTH
    seen = np.concatenate([samples.tokens(number)[:-1] for number in range(samples.samples_per_epoch)])
    assert len(set(seen.tolist())) == seen.size == samples.samples_per_epoch * LENGTH
    batch = BatchSettings(sequence_length=LENGTH, micro_batch_size=2, global_batch_size=2)
    inputs, labels = next(batches(samples, 0, batch, 0, 1))
    assert inputs.dtype == labels.dtype == torch.int64 and inputs.shape == labels.shape == (2, LENGTH)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])
    assert (
        inputs[0].tolist() == samples.tokens(0)[:-1].tolist() and inputs[1].tolist() == samples.tokens(1)[:-1].tolist()
    )


def test_later_epochs_are_other_orders_of_the_same_samples(corpus_folder):
    samples = corpus(corpus_folder)
    epochs = [
        [tuple(samples.tokens(epoch * samples.samples_per_epoch + i)) for i in range(samples.samples_per_epoch)]
        for epoch in range(3)
    ]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert tuple(samples.tokens(1)) == epochs[0][1]  # back to an earlier epoch


@pytest.mark.parametrize("data_parallel", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_global_batch_is_the_same_samples_for_any_ranks_and_micro_batch(corpus_folder, data_parallel, micro_batch):
    samples = corpus(corpus_folder)
    batch = BatchSettings(sequence_length=LENGTH, micro_batch_size=micro_batch, global_batch_size=12)
    per_step = 12 // data_parallel // micro_batch
    feeds = [batches(samples, 24, batch, rank, data_parallel) for rank in range(data_parallel)]
    for step in range(9):  # past the end of the first epoch
        found = [first for feed in feeds for first in first_column(feed, per_step)]
        assert found == [samples.tokens(24 + 12 * step + i)[0] for i in range(12)]


def test_resuming_continues_the_order(corpus_folder):
    samples = corpus(corpus_folder)
    batch = BatchSettings(sequence_length=LENGTH, micro_batch_size=2, global_batch_size=4)
    whole = first_column(batches(samples, 0, batch, 0, 1), 12)
    assert (
        first_column(batches(samples, 0, batch, 0, 1), 6) + first_column(batches(samples, 12, batch, 0, 1), 6) == whole
    )


def test_order_depends_on_the_seed_and_not_on_the_cache(corpus_folder, tmp_path: Path):
    def order(seed, cache):
        samples = open_corpus(describe(str(corpus_folder / "a")), LENGTH, seed, cache)
        return [samples.tokens(i)[0] for i in range(30)]

    assert order(3, corpus_folder / "cache") == order(3, corpus_folder / "cache") == order(3, tmp_path)
    assert order(3, tmp_path) != order(4, tmp_path)


def test_a_blend_follows_the_weights_and_begins_alike_for_any_length(corpus_folder):
    parts = [corpus(corpus_folder), corpus(corpus_folder, name="b")]
    short, long = (Blend(parts, [1.0, 3.0], size) for size in (40, 80))
    origin = [int(long.tokens(i)[0] >= 10000) for i in range(80)]
    assert sum(origin) == 60
    assert [tuple(short.tokens(i)) for i in range(40)] == [tuple(long.tokens(i)) for i in range(40)]
    from_b = [tuple(long.tokens(i)) for i in range(80) if origin[i]]
    assert from_b == [tuple(parts[1].tokens(i)) for i in range(60)]
    mix = [(describe(str(corpus_folder / "a")), 1.0), (describe(str(corpus_folder / "b")), 3.0)]
    opened = open_training_data(mix, LENGTH, 3, corpus_folder / "cache", 80)
    assert [tuple(opened.tokens(i)) for i in range(80)] == [tuple(long.tokens(i)) for i in range(80)]


def test_held_out_samples_are_the_same_for_any_ranks(corpus_folder):
    samples = open_held_out_data(describe(str(corpus_folder / "b")), LENGTH, corpus_folder / "cache", 12)
    batch = BatchSettings(sequence_length=LENGTH, micro_batch_size=2, global_batch_size=4)
    alone = first_column(held_out_batches(samples, 12, batch, 0, 1), 99)
    shared = [first for rank in range(3) for first in first_column(held_out_batches(samples, 12, batch, rank, 3), 99)]
    assert alone == shared == [samples.tokens(i)[0] for i in range(12)]


def test_too_few_held_out_samples_are_refused(corpus_folder):
    with pytest.raises(ConfigError, match="evaluation.samples 999: .*b.bin has 71 samples of sequence_length 7"):
        open_held_out_data(describe(str(corpus_folder / "b")), LENGTH, corpus_folder / "cache", 999)


def test_less_than_one_sample_is_refused(tmp_path: Path):
    write_data(tmp_path / "tiny", count=6)
    with pytest.raises(ConfigError, match="tiny.bin: 6 tokens, fewer than one sample of sequence_length 7"):
        open_corpus(describe(str(tmp_path / "tiny")), LENGTH, 0, tmp_path / "cache")


def test_an_index_of_other_data_is_not_reused(tmp_path: Path):
    prefix = write_data(tmp_path / "x")
    open_corpus(describe(prefix), LENGTH, 0, tmp_path / "cache")
    write_data(tmp_path / "x", count=200)
    assert open_corpus(describe(prefix), LENGTH, 0, tmp_path / "cache").samples_per_epoch == 199 // LENGTH


def test_a_damaged_index_is_built_again(corpus_folder, tmp_path: Path):
    data = describe(str(corpus_folder / "a"))
    expected = [tuple(open_corpus(data, LENGTH, 3, tmp_path).tokens(number)) for number in range(20)]
    for pattern in ("*document_index.npy", "*sample_index.npy", "*shuffle_index.npy"):
        (stored,) = tmp_path.rglob(pattern)
        content = bytearray(stored.read_bytes())
        content[-3] ^= 1  # one entry of the index
        stored.write_bytes(content)
        assert [tuple(open_corpus(data, LENGTH, 3, tmp_path).tokens(number)) for number in range(20)] == expected
    stored.write_bytes(b"not an array")
    assert tuple(open_corpus(data, LENGTH, 3, tmp_path).tokens(0)) == expected[0]
    stored.unlink()
    assert tuple(open_corpus(data, LENGTH, 3, tmp_path).tokens(0)) == expected[0]


def test_an_index_that_is_no_array_is_built_again_and_never_unpickled(corpus_folder, tmp_path: Path):
    data = describe(str(corpus_folder / "a"))
    expected = tuple(open_corpus(data, LENGTH, 3, tmp_path / "cache").tokens(0))
    (stored,) = (tmp_path / "cache").rglob("*shuffle_index.npy")
    content = b"cos\nsystem\n(S'touch " + str(tmp_path / "canary").encode() + b"'\ntR."
    stored.write_bytes(content)
    (stored.parent / "manifest.json").unlink()
    seal(stored.parent, "index of samples", {"sequence_length": LENGTH, "seed": 3})
    assert tuple(open_corpus(data, LENGTH, 3, tmp_path / "cache").tokens(0)) == expected
    assert not (tmp_path / "canary").exists()
