"""Held-out sets by name, epochs at the start, and another mix on resume, with a stand-in engine that has one number."""

import json
import math

import pytest
from one_number import LENGTH, curve, make_world, settings, stop_at, stoppable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from token_data import write_documents

from incr_ds.data.fingerprint import describe
from incr_ds.data.samples import open_corpus
from incr_ds.errors import ConfigError
from incr_ds.train import loop
from incr_ds.train.pretraining import pretrain


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The world of one number with two more corpora, whose samples differ in their tokens."""
    made = make_world(tmp_path, monkeypatch)
    for name, first in (("old", 0), ("new", 50)):
        write_documents(tmp_path / name, [[first + number % 47 for number in range(20 * LENGTH + 1)]])
    made["read"], batches = [], loop.batches

    def recorded(*arguments):
        for inputs, labels in batches(*arguments):
            made["read"] += inputs.tolist()
            yield inputs, labels

    monkeypatch.setattr(loop, "batches", recorded)
    return made


def data(world, *train, **others):
    folder = world["folder"]
    return {"train": [{"prefix": str(folder / name), "weight": weight} for name, weight in train], **others}


def held_out(world, **names):
    return {name: str(world["folder"] / prefix) for name, prefix in names.items()}


def samples_of(world, name, numbers):
    corpus = open_corpus(describe(str(world["folder"] / name)), LENGTH, 0, world["folder"] / "cache")
    return [corpus.tokens(number)[:-1].tolist() for number in numbers]


def test_held_out_sets_with_names_are_reported_apart(world, capsys):
    facts = {"splits": {"validation": {"tokens": 10, "bytes": 40}}}
    (world["folder"] / "x_facts.json").write_text(json.dumps(facts))
    alone = {
        name: curve(
            settings_run(world, f"of_{name}", data(world, ("old", 1.0), validation=held_out(world, x=name)["x"]))
        )
        for name in ("old", "new")
    }
    capsys.readouterr()
    sets = held_out(world, before="old", after="new", text="x_validation_text_document")
    rows = curve(settings_run(world, "both", data(world, ("old", 1.0), validation=sets), tensorboard=True))
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    assert [row["step"] for row in evaluations] == [0, 2, 4, 6]
    for number, row in enumerate(evaluations):
        found = row["sets"]
        assert list(found) == ["before", "after", "text"]
        for name, run in (("before", "old"), ("after", "new")):
            single = [item for item in alone[run] if item["kind"] == "evaluation"][number]
            unknown = {"bits_per_byte": None, "teacher_kl": None}
            assert found[name] == {"loss": single["loss"], "perplexity": single["perplexity"], **unknown}
            assert "sets" not in single
        assert found["text"]["bits_per_byte"] == pytest.approx(found["text"]["loss"] / math.log(2) / 4)
        assert row["loss"] == pytest.approx(sum(each["loss"] for each in found.values()) / 3)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"])) and row["bits_per_byte"] is None
    last = evaluations[-1]["sets"]
    shown = ", ".join(f"{name} {last[name]['loss']:.4f}" for name in last)
    assert f"step 6/6  held-out loss {evaluations[-1]['loss']:.4f} ({shown})  perplexity" in capsys.readouterr().out
    board = EventAccumulator(str(world["folder"] / "both" / "tensorboard")).Reload()
    for name, found in last.items():
        event = board.Scalars(f"evaluation/{name}/loss")[-1]
        assert (event.step, event.value) == (6, pytest.approx(found["loss"]))


def settings_run(world, output, data, **changes):
    run = settings(world, output, data=data, **changes)
    pretrain(run)
    return run


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({}, r"data\.validation.*at least 1 item"),
        ({"a/b": "x"}, r"data\.validation.*should match pattern"),
        ({"a": 5}, r"data\.validation.*valid string"),
        ({"a": "gone"}, r"gone\.bin: no such file"),
    ],
)
def test_wrong_names_of_held_out_sets_are_refused(world, validation, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        settings_run(world, "run", data(world, ("old", 1.0), validation=validation))


def test_a_run_says_how_many_epochs_of_each_corpus_it_reads(world, capsys):
    """24 samples: 18 of old and 6 of new, which have 20 each."""
    settings_run(world, "run", data(world, ("old", 3.0), ("new", 1.0)), evaluation=None)
    shown, folder = capsys.readouterr().out, world["folder"]
    assert f"data: {folder}/old: 75.0% of the samples, 0.90 epochs of 20 samples\n" in shown
    assert f"data: {folder}/new: 25.0% of the samples, 0.30 epochs of 20 samples\n" in shown


def test_another_mix_is_refused_on_resume_unless_a_key_allows_it(world):
    """12 samples of old, then the rest of the 24 half from each, through a stop and another mix."""
    before = settings(world, "run", data=data(world, ("old", 1.0)), evaluation=None)
    world["on_step"] = stop_at(3)
    assert stoppable(before).stopped
    world["on_step"] = lambda step, number: number
    assert world["read"] == samples_of(world, "old", range(12))
    mixed = data(world, ("old", 1.0), ("new", 1.0))
    with pytest.raises(ConfigError) as refused:
        pretrain(settings(world, "run", data=mixed, evaluation=None))
    assert f"data {world['folder']}/new: not part of it" in str(refused.value)
    assert "data.train: [" in str(refused.value)
    assert str(refused.value).endswith("With resume.change_data: true, the run reads other data from here on.")

    world["read"].clear()
    world["on_step"] = stop_at(1)
    allowed = {"evaluation": None, "resume": {"change_data": True}}
    assert stoppable(settings(world, "run", data=mixed, **allowed)).position.step == 4
    old, new = (part(world["read"], first) for first in (0, 50))
    assert old == samples_of(world, "old", range(12, 14)) and new == samples_of(world, "new", range(2))

    world["read"].clear()
    world["on_step"] = stop_at(1)
    assert stoppable(settings(world, "run", data=mixed, evaluation=None)).position.step == 5, "the mix is the run's now"
    old, new = (part(world["read"], first) for first in (0, 50))
    assert old == samples_of(world, "old", range(14, 16)) and new == samples_of(world, "new", range(2, 4))

    world["read"].clear()
    world["on_step"] = lambda step, number: number
    only_new = data(world, ("new", 1.0))
    outcome = pretrain(settings(world, "run", data=only_new, **allowed))
    assert (outcome.position.step, outcome.position.consumed_samples) == (6, 24)
    assert world["read"] == samples_of(world, "new", range(4, 8))
    assert [mix["until"] for mix in read_past(outcome.checkpoint)] == [12, 20]


def part(rows, first):
    return [row for row in rows if first <= min(row) and max(row) < first + 50]


def read_past(checkpoint):
    return json.loads((checkpoint / "manifest.json").read_text())["facts"]["past_mixes"]


def test_a_stopped_run_with_the_key_goes_on_as_if_it_had_not_been_stopped(world):
    """The key alone changes nothing, wherever the run is stopped."""
    mixed = data(world, ("old", 1.0), ("new", 3.0))
    whole = settings_run(world, "whole", mixed, evaluation=None)
    run = settings(world, "parts", data=mixed, evaluation=None, resume={"change_data": True})
    for _ in range(2):
        world["on_step"] = stop_at(2)
        stoppable(run)
    world["on_step"] = lambda step, number: number
    assert read_past(pretrain(run).checkpoint) == []
    assert [row["loss"] for row in curve(run)] == [row["loss"] for row in curve(whole)]


def test_other_held_out_data_needs_the_key_too(world):
    one = data(world, ("old", 1.0), validation=held_out(world, a="old"))
    two = data(world, ("old", 1.0), validation=held_out(world, a="old", b="new"))
    world["on_step"] = stop_at(3)
    stoppable(settings(world, "run", data=one))
    world["on_step"] = lambda step, number: number
    with pytest.raises(ConfigError, match="data .*/new: not part of it"):
        pretrain(settings(world, "run", data=two))
    run = settings_run(world, "run", two, resume={"change_data": True})
    found = [list(row["sets"]) for row in curve(run) if row["kind"] == "evaluation"]
    assert found == [["a"], ["a"], ["a", "b"], ["a", "b"]]
