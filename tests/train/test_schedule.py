import math

import pytest

from incr_ds.config.distillation import DistillationSettings
from incr_ds.config.schedule import ScheduleSettings
from incr_ds.errors import ConfigError
from incr_ds.testing.runs import pico_run
from incr_ds.train.schedule import (
    distillation_temperature,
    distillation_weight,
    learning_rate,
    step_seed,
    steps_taught,
)


def rates(**settings):
    schedule = ScheduleSettings(**settings)
    return [learning_rate(schedule, step) for step in range(schedule.train_steps + 1)]


def test_cosine_with_warm_up_reaches_its_corners():
    found = rates(train_steps=10, learning_rate=1.0, min_learning_rate=0.2, warmup_steps=3)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[10] == pytest.approx(0.2)
    assert found[5] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 2 / 7)))
    assert found[3:] == sorted(found[3:], reverse=True)


def test_linear_falls_evenly_to_the_minimum():
    found = rates(train_steps=6, learning_rate=1.0, min_learning_rate=0.2, warmup_steps=2, decay="linear")
    assert found == pytest.approx([1 / 3, 2 / 3, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_rewarm_up_starts_at_its_fraction_of_the_peak():
    found = rates(train_steps=8, learning_rate=2.0, warmup_steps=3, warmup_from=0.5, decay="constant")
    assert found == pytest.approx([1.25, 1.5, 1.75, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0])


def test_wsd_is_flat_and_then_linear_to_the_minimum():
    found = rates(train_steps=10, learning_rate=1.0, min_learning_rate=0.2, warmup_steps=1, decay="wsd", decay_steps=4)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_a_run_that_is_a_part_of_a_schedule_has_the_rates_of_the_same_steps():
    whole = ScheduleSettings(train_steps=10, learning_rate=1.0, min_learning_rate=0.2, warmup_steps=3)
    part = whole.model_copy(update={"start_step": 4, "end_step": 7})
    assert [learning_rate(part, step) for step in range(4, 7)] == [learning_rate(whole, step) for step in range(4, 7)]
    assert (part.last_step, whole.last_step) == (7, 10)


def test_a_re_warm_up_multiplies_the_schedule_from_the_start_step_on():
    """A third, two thirds and all of the way from 0.25 to 1, on a cosine that has not restarted."""
    part = ScheduleSettings(
        train_steps=10, learning_rate=2.0, warmup_steps=2, start_step=4, rewarmup_steps=2, rewarmup_from=0.25
    )
    cosine = [1.0 + math.cos(math.pi * (step - 2) / 8) for step in range(4, 10)]
    shares = [0.5, 0.75, 1, 1, 1, 1]
    assert [learning_rate(part, step) for step in range(4, 10)] == pytest.approx(
        [rate * share for rate, share in zip(cosine, shares, strict=True)]
    )


def test_a_re_warm_up_under_wsd_rises_to_the_plateau_and_decays_as_the_whole():
    part = ScheduleSettings(
        train_steps=10, learning_rate=1.0, decay="wsd", decay_steps=4, start_step=3, rewarmup_steps=1, rewarmup_from=0.5
    )
    assert [learning_rate(part, step) for step in range(3, 10)] == pytest.approx([0.75, 1, 1, 1, 0.75, 0.5, 0.25])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"start_step": 5, "end_step": 5}, r"start_step 5 and end_step 5 are not a part of the schedule's 10 steps"),
        (
            {"end_step": 11},
            r"end_step 11 are not a part of the schedule's 10 steps: expected 0 <= start_step < end_step",
        ),
        ({"rewarmup_steps": 2}, r"rewarmup_steps 2 belongs to a run with a start_step; at step 0 it is warmup_steps"),
        ({"start_step": 8, "rewarmup_steps": 3}, r"rewarmup_steps 3 exceed the 2 steps from 8 to 10"),
    ],
)
def test_a_part_that_is_not_one_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        ScheduleSettings(train_steps=10, learning_rate=1.0, **keys)


def test_the_teacher_counts_from_the_first_step_of_a_run_or_from_a_stated_one():
    schedule = {"train_steps": 9, "learning_rate": 1.0, "start_step": 4}
    taught = {"teacher": "t", "anneal_steps": 3}
    assert [steps_taught(pico_run(schedule=schedule, distillation=taught), step) for step in (4, 8)] == [0, 4]
    earlier = pico_run(schedule=schedule, distillation={**taught, "start_step": 1})
    assert [steps_taught(earlier, step) for step in (4, 8)] == [3, 7]
    with pytest.raises(ConfigError, match="distillation.start_step 5 is after the run's first step 4"):
        pico_run(schedule=schedule, distillation={**taught, "start_step": 5})


def test_without_warm_up_the_first_step_is_at_the_peak():
    assert rates(train_steps=4, learning_rate=1.0)[0] == 1.0


@pytest.mark.parametrize(
    ("anneal", "expected"),
    [("linear", [0.8, 0.65, 0.5, 0.35, 0.2, 0.2]), ("cosine", [0.8, 0.7121, 0.5, 0.2879, 0.2, 0.2])],
)
def test_distillation_weight_and_temperature_anneal_and_stay(anneal, expected):
    settings = DistillationSettings(
        teacher="t", weight=0.8, final_weight=0.2, anneal_steps=4, anneal=anneal, temperature=0.8, final_temperature=0.2
    )
    assert [distillation_weight(settings, step) for step in range(6)] == pytest.approx(expected, abs=1e-4)
    assert [distillation_temperature(settings, step) for step in range(6)] == pytest.approx(expected, abs=1e-4)


def test_the_final_weight_is_exact_and_nothing_is_taught_without_settings():
    settings = DistillationSettings(teacher="t", weight=0.9, anneal_steps=3, temperature=2.0)
    assert distillation_weight(settings, 3) == 0.0
    assert distillation_temperature(settings, 3) == 2.0
    assert (distillation_weight(None, 0), distillation_temperature(None, 0)) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("steps", "train_steps", "found"),
    [("1%", 1000, 10), ("1%", 1001, 11), ("0.1 %", 250, 1), ("100%", 7, 7), ("2.5%", 400, 10), (3, 1000, 3)],
)
def test_steps_as_a_share_of_train_steps(steps, train_steps, found):
    schedule = ScheduleSettings(train_steps=train_steps, learning_rate=1.0, warmup_steps=steps)
    assert schedule.warmup_steps == found
    both = {"decay": "wsd", "decay_steps": "10%", "warmup_steps": 0}
    assert ScheduleSettings(train_steps=30, learning_rate=1.0, **both).decay_steps == 3


def test_a_growth_at_a_share_of_train_steps():
    schedule = {"train_steps": 9, "learning_rate": 1.0}
    growth = [
        {"at_step": "25%", "recipe": "a.yaml"},
        {"at_step": 4, "recipe": "b.yaml"},
        {"at_step": "50%", "recipe": "c"},
    ]
    assert [step.at_step for step in pico_run(schedule=schedule, growth=growth).growth] == [3, 4, 5]
    with pytest.raises(ConfigError, match=r"growth.0.at_step: Input should be a valid integer"):
        pico_run(schedule=schedule, growth=[{"at_step": "half", "recipe": "a.yaml"}])


@pytest.mark.parametrize("steps", ["1", "-1%", "1e3%", "%", "0.01", "5000%", None, 0.01])
def test_steps_that_are_no_share(steps):
    with pytest.raises(ValueError, match="warmup_steps"):
        ScheduleSettings(train_steps=1000, learning_rate=1.0, warmup_steps=steps)


def test_seeds_of_steps_are_the_same_everywhere():
    """Dropout must continue as it would have on another machine: the numbers are part of the format."""
    assert step_seed(0, 0, 0) == -6762612006551763605
    assert len({step_seed(seed, step, rank) for seed in (0, 1) for step in range(50) for rank in range(4)}) == 400
