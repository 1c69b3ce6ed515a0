"""Epochs of each corpus, and mixes that follow one another: each corpus goes on where it stood."""

from pathlib import Path

import pytest
from token_data import write_documents

from incr_ds.data.fingerprint import describe
from incr_ds.data.mixture import PastMix, corpus_uses, samples_read
from incr_ds.data.samples import open_corpus, open_training_data
from incr_ds.testing.runs import pico_run

LENGTH = 4


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory):
    """Corpora a, b and c of 10, 15 and 20 samples. No token occurs twice."""
    folder = tmp_path_factory.mktemp("mixture")
    tokens = iter(range(10_000))
    return {
        name: describe(write_documents(folder / name, [[next(tokens) for _ in range(samples * LENGTH + 1)]]))
        for name, samples in (("a", 10), ("b", 15), ("c", 20))
    }


def test_epochs_are_counted_by_hand():
    run = pico_run(
        batch={"sequence_length": 10, "micro_batch_size": 2, "global_batch_size": 4},
        schedule={"train_steps": 50, "learning_rate": 0.1, "start_step": 10},
        data={"train": [{"prefix": "new", "weight": 3.0}, {"prefix": "old"}, {"prefix": "absent"}]},
    )
    # 40 steps of 4 samples: 96 of new and 32 of old, which have 64 and 10 samples of 10 tokens
    new, old = corpus_uses(run, {"new": 641, "old": 110})
    assert (new.share, new.samples_per_epoch, new.epochs) == (0.6, 64, 1.5)
    assert (old.samples_per_epoch, old.epochs) == (10, 3.2)
    assert str(new) == "data: new: 60.0% of the samples, 1.50 epochs of 64 samples"


def first_tokens(sets, tmp_path, train, past, numbers):
    opened = open_training_data(train, LENGTH, 3, tmp_path, max(numbers) + 1, past=past)
    return [int(opened.tokens(number)[0]) for number in numbers]


def of(sets, name, tmp_path, numbers):
    corpus = open_corpus(sets[name], LENGTH, 3, tmp_path)
    return [int(corpus.tokens(number)[0]) for number in numbers]


def names_of(sets, tokens):
    return "".join(name for token in tokens for name, data in sets.items() if data.smallest <= token <= data.largest)


def test_a_changed_mix_reads_each_corpus_on_from_where_it_stood(sets, tmp_path: Path):
    a, b, c = sets["a"], sets["b"], sets["c"]
    alone = PastMix(6, ((a.fingerprint, 1.0),))  # 6 of a
    mixed = PastMix(14, ((a.fingerprint, 1.0), (b.fingerprint, 3.0)))  # 8 more: 2 of a, 6 of b
    assert samples_read([alone]) == (6, {a.fingerprint: 6})
    assert samples_read([alone, mixed]) == (14, {a.fingerprint: 8, b.fingerprint: 6})
    numbers = range(14, 26)
    tokens = first_tokens(sets, tmp_path, [(b, 1.0), (a, 1.0), (c, 2.0)], [alone, mixed], numbers)
    shown = names_of(sets, tokens)
    assert [shown.count(name) for name in "abc"] == [3, 3, 6]
    for name, start in (("a", 8), ("b", 6), ("c", 0)):
        mine = [token for token, other in zip(tokens, shown, strict=True) if other == name]
        assert mine == of(sets, name, tmp_path, range(start, start + len(mine))), name
    # a single corpus after a mix, across the end of its epoch of 15 samples
    assert first_tokens(sets, tmp_path, [(b, 2.0)], [alone, mixed], numbers) == of(sets, "b", tmp_path, range(6, 18))
