"""A run that diverges goes back and skips what it has read; a save that fails is tried again. With a stand-in engine."""

import errno
import math
import re
from types import SimpleNamespace

import pytest
from one_number import SKIPPED, curve, make_world, names, settings
from token_data import write_random_documents

from incr_ds.config.training import CheckpointSettings
from incr_ds.data.samples import Blend
from incr_ds.errors import CheckpointError
from incr_ds.train import pretraining
from incr_ds.train.checkpoints import TrainingState
from incr_ds.train.metrics import Position, read_metrics
from incr_ds.train.pretraining import pretrain
from incr_ds.train.recovery import DivergedError
from incr_ds.train.saving import Saver
from incr_ds.train.schedule import learning_rate

BATCH = 4
ROLL_BACK = {"action": "roll_back", "max_roll_backs": 2, "max_loss_rise": 2.0}
ROLL_BACK |= {"rise_steps": 2, "max_skipped_steps": 3}


@pytest.fixture
def world(tmp_path, monkeypatch):
    world = make_world(tmp_path, monkeypatch)
    write_random_documents(tmp_path, documents=60, length=30)  # 224 samples: no batch is read twice
    return world


def long(world, output, **changes):
    changes = {
        "schedule": {"train_steps": 12, "learning_rate": 0.1},
        "evaluation": None,
        "divergence": ROLL_BACK,
    } | changes
    return settings(world, output, checkpoint={"interval": 3, "keep_last": 0}, **changes)


def bad_batches(world, monkeypatch, numbers, loss):
    """Give the global batches with these numbers this loss, by their content. Returns the list of the batches read."""
    read, of_content, open_data = [], {}, pretraining.open_data

    def remembered(run, architecture, saved=None):
        data = open_data(run, architecture, saved)
        for number in range(40):
            content = data.train.tokens(BATCH * number + 2)[:-1].tobytes()  # of the second micro-batch's first sample
            assert of_content.setdefault(content, number) == number
        return data

    def on_step(step, number):
        read.append(of_content[world["engines"][-1].inputs[1][0].numpy().tobytes()])
        return loss if read[-1] in numbers else 4.0

    monkeypatch.setattr(pretraining, "open_data", remembered)
    world["on_step"] = on_step
    return read


def roll_backs(run):
    return [item for item in curve(run) if item["kind"] == "roll_back"]


def test_a_loss_that_jumps_is_rolled_back_and_its_samples_are_skipped(world, monkeypatch, capsys):
    run = long(world, "run")
    read = bad_batches(world, monkeypatch, {7, 8}, 90.0)
    outcome = pretrain(run)
    # Step 6 is saved. Steps 8 and 9 are too high. From step 6 on, the run reads what follows the bad batches.
    assert read == [*range(9), *range(9, 15)]
    (row,) = roll_backs(run)
    assert (row["step"], row["from_step"], row["number"]) == (6, 9, 1)
    assert (row["first_sample"], row["last_sample"]) == (24, 35)
    assert re.match("the loss rose: .* for 2 step.*; gradient norm 1, learning rate 0.", row["reason"])
    assert [item["step"] for item in curve(run) if item["kind"] == "train"] == list(range(1, 13))
    assert outcome.position.step == 12 and outcome.position.consumed_samples == 48
    assert (outcome.state.skipped_samples, outcome.state.roll_backs) == (12, 1)
    flops = [item["flops"] for item in curve(run) if item["kind"] == "train"]
    assert flops[6] == pytest.approx(10 * flops[0]) and flops[-1] == pytest.approx(
        15 * flops[0]
    )  # all 15 steps are paid
    said = capsys.readouterr().out
    assert "step_00000006. Going back to it." in said
    assert "went back from step 9 and skips samples 24 to 35 (roll-back 1)" in said


def test_what_follows_a_roll_back_is_what_training_on_the_later_samples_gives(world, monkeypatch):
    run, clean = long(world, "run"), long(world, "clean")
    bad_batches(world, monkeypatch, {7, 8}, 90.0)
    pretrain(run)
    rolled_back = world["engines"][-1].number
    # The same by hand: the healthy checkpoint of a clean run, continued on data that begins three batches later.
    bad_batches(world, monkeypatch, set(), 90.0)
    pretrain(clean.model_copy(update={"schedule": clean.schedule.model_copy(update={"end_step": 6})}))
    number, first = world["engines"][-1].number, clean.data.start_sample
    data = pretraining.open_data(clean, pretraining.find_start(clean).architecture).train
    for step in range(6, 12):
        rate = learning_rate(clean.schedule, step)
        for micro in (0, 2):
            rows = [data.tokens(first + BATCH * (step + 3) + micro + one)[:-1] for one in (0, 1)]
            number = (0.9 * number + rate * sum(row.mean() for row in rows) / 2) % 10.0
    assert rolled_back == pytest.approx(number, rel=1e-12)


def test_a_run_killed_after_a_roll_back_goes_on_as_if_it_had_not_been(world, monkeypatch):
    whole, parts = long(world, "whole"), long(world, "parts")
    bad_batches(world, monkeypatch, {7, 8}, 90.0)
    expected = pretrain(whole)
    number = world["engines"][-1].number
    for killed_at in (10, 13):  # reads until then: before the first save after the roll-back, and after it
        read = bad_batches(world, monkeypatch, {7, 8}, 90.0)
        counting = world["on_step"]

        def killed(step, number, read=read, counting=counting, killed_at=killed_at):
            if len(read) == killed_at:
                raise KeyboardInterrupt
            return counting(step, number)

        world["on_step"] = killed
        with pytest.raises(KeyboardInterrupt):
            pretrain(parts)
        world["on_step"] = counting
        assert pretrain(parts).state.skipped_samples == expected.state.skipped_samples
        assert world["engines"][-1].number == number
        assert [item | {"flops": 0} for item in curve(parts)] == [item | {"flops": 0} for item in curve(whole)]
        parts = long(world, "again")


def test_roll_backs_are_bounded_and_the_error_says_how_many_there_were(world, monkeypatch):
    run = long(world, "run")
    read = bad_batches(world, monkeypatch, set(range(7, 40)), 90.0)
    with pytest.raises(
        DivergedError, match=r"step 8: .* It went back 2 time.s. .divergence.max_roll_backs..*step_00000006"
    ):
        pretrain(run)
    assert len(read) == 13 and [row["number"] for row in roll_backs(run)] == [2]
    assert names(run) == ["step_00000003", "step_00000006"]


def test_a_run_without_a_healthy_checkpoint_ends(world, monkeypatch):
    bad_batches(world, monkeypatch, {1, 2}, 90.0)
    with pytest.raises(DivergedError, match="step 3: the loss rose: .*there is no checkpoint to resume from"):
        pretrain(long(world, "run"))


def test_a_batch_that_is_not_finite_is_skipped_and_named(world, monkeypatch, capsys):
    run = long(world, "run", log_interval=5)
    read = bad_batches(world, monkeypatch, {6, 7}, SKIPPED)
    assert pretrain(run).state.roll_backs == 0
    assert read == list(range(12))
    found = [(item["step"], item["skipped"]) for item in curve(run) if item["kind"] == "train"]
    assert found == [(1, False), (5, False), (7, True), (8, True), (10, False), (12, False)]
    assert (
        "step 7: not finite: loss 4.25, gradient norm nan, on samples 24 to 27; the step was skipped"
        in capsys.readouterr().out
    )


def test_a_loss_that_is_not_a_number_counts_as_skipped_if_the_step_was(world, monkeypatch, capsys):
    run = long(world, "run")
    read = bad_batches(world, monkeypatch, {6, 7}, math.nan)
    world["skips"] = True
    assert pretrain(run).position.step == 12 and len(read) == 12
    assert "step 8: not finite: loss nan, gradient norm nan, on samples 28 to 31" in capsys.readouterr().out
    read = bad_batches(world, monkeypatch, {6, 7, 8}, math.nan)
    assert pretrain(long(world, "three")).state.roll_backs == 1
    assert read == [*range(9), *range(9, 15)]


class TestSaver:
    """Saves that fail with a stand-in: two attempts each, and a bounded number of failed saves in a row."""

    def saver(self, tmp_path, failures, **settings):
        self.said, self.begun, self.pruned, failing = [], [], [], iter(failures)

        class Pending:
            def __init__(self, step):
                self.step = step

            def is_written(self):
                return True

            def publish(self):
                if next(failing, False):
                    raise CheckpointError(f"step {self.step}: saving failed: no space.")
                return tmp_path / f"step_{self.step}"

        def begin(state):
            self.begun.append(state.position.step)
            return Pending(state.position.step)

        def prune(newest):
            self.pruned.append(newest.name)
            if newest.name == "step_99":
                raise OSError(errno.EACCES, "Permission denied", "old")

        saves = SimpleNamespace(begin=begin, prune=prune)
        return Saver(saves, CheckpointSettings(interval=1, **settings), None, self.said.append)

    def at(self, step):
        return TrainingState(position=Position(step=step), evaluated_step=-1, data={}, settings={})

    def test_one_failure_is_tried_once_more(self, tmp_path):
        saver = self.saver(tmp_path, [True, False])
        saver.save(self.at(5), must=False)
        assert saver.newest == tmp_path / "step_5" and self.begun == [5, 5] and self.pruned == ["step_5"]
        assert self.said == ["step 5: saving failed: no space. Trying once more.", f"saved {tmp_path}/step_5"]

    def test_two_failures_leave_the_save_out_and_three_such_saves_end_the_run(self, tmp_path):
        saver = self.saver(tmp_path, [True] * 4 + [False] + [True] * 6)
        saver.save(self.at(1), must=False)
        saver.save(self.at(2), must=False)
        assert saver.newest is None and "failed save 2 in a row of 2 allowed (checkpoint.max_failures)" in self.said[-1]
        saver.save(self.at(3), must=False)  # which starts the count again
        for step in (4, 5):
            saver.save(self.at(step), must=False)
        with pytest.raises(CheckpointError, match="step 6: saving failed: no space"):
            saver.save(self.at(6), must=False)
        assert saver.newest == tmp_path / "step_3"

    def test_the_last_save_of_a_run_must_not_be_left_out(self, tmp_path):
        saver = self.saver(tmp_path, [True, True])
        with pytest.raises(CheckpointError, match="step 9"):
            saver.save(self.at(9), must=True)

    def test_a_save_in_the_background_is_published_later(self, tmp_path):
        saver = self.saver(tmp_path, [], background=True)
        saver.save(self.at(1), must=False)
        assert saver.newest is None and saver.poll() and saver.newest == tmp_path / "step_1"
        assert not saver.poll() and not saver.due

    def test_a_failed_save_in_the_background_makes_the_next_healthy_step_due_and_saves_no_other(self, tmp_path):
        saver = self.saver(tmp_path, [True, False], background=True)
        saver.save(self.at(4), must=False)
        saver.finish()  # as a run does that has diverged
        assert saver.due and saver.newest is None and self.begun == [4]
        assert self.said == ["step 4: saving failed: no space. The next healthy step is saved instead."]
        saver.save(self.at(7), must=False)
        assert saver.newest == tmp_path / "step_7" and not saver.due and self.begun == [4, 7]

    def test_a_failed_save_in_the_background_does_not_save_the_next_one_twice(self, tmp_path):
        saver = self.saver(tmp_path, [True, False], background=True)
        saver.save(self.at(4), must=False)
        saver.save(self.at(5), must=True)
        assert self.begun == [4, 5] and saver.newest == tmp_path / "step_5"

    def test_saves_in_the_background_that_always_fail_end_the_run(self, tmp_path):
        saver = self.saver(tmp_path, [True] * 6, background=True)
        with pytest.raises(CheckpointError, match="step 6: saving failed"):
            for step in range(1, 7):
                saver.save(self.at(step), must=False)
        assert self.begun == [1, 2, 3, 4, 5, 6]

    def test_old_checkpoints_that_cannot_be_deleted_do_not_make_the_save_fail(self, tmp_path):
        saver = self.saver(tmp_path, [])
        saver.save(self.at(99), must=True)
        assert saver.newest == tmp_path / "step_99" and self.begun == [99]
        assert self.said[-1].startswith("old checkpoints were not deleted: ") and "Permission denied" in self.said[-1]


def test_a_blend_goes_on_past_the_size_that_it_was_drawn_for():
    class Numbered:
        def __init__(self, base):
            self.base = base

        def tokens(self, number):
            return self.base + number

    short, long = (Blend([Numbered(0), Numbered(1000)], [1.0, 3.0], size) for size in (8, 64))
    assert [short.tokens(number) for number in range(60)] == [long.tokens(number) for number in range(60)]


def test_the_row_of_a_roll_back_is_read_again(world, monkeypatch):
    run = long(world, "run")
    bad_batches(world, monkeypatch, {7, 8}, 90.0)
    pretrain(run)
    kinds = [item["kind"] for item in read_metrics(world["folder"] / "run" / "metrics.jsonl")]
    assert kinds.count("roll_back") == 1
