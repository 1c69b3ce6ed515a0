"""How a run goes from stage to stage, with a stand-in engine of one number in one process."""

import json
import math

import pytest
import yaml
from one_number import curve, make_world, names, settings, stop_at, stoppable

from incr_ds.errors import ConfigError
from incr_ds.train import loop, pretraining
from incr_ds.train.metrics import read_metrics
from incr_ds.train.pretraining import pretrain
from incr_ds.train.recovery import DivergedError
from incr_ds.train.start import Start, find_start


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Recipes in the world's folder; a grown stage starts without opening the stand-in's checkpoints."""
    world = make_world(tmp_path, monkeypatch)
    for name, layers in (("first", 4), ("second", 6)):
        recipe = {"target": {"num_hidden_layers": layers}, "depth": {"method": "append"}}
        (world["folder"] / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    world["opened"] = []

    def start(run):
        if run.model.config is not None:
            return find_start(run)
        world["opened"].append(run.model.initialize_from.source)
        return Start(architecture=None, description=f"grown from {run.model.initialize_from.source}")

    monkeypatch.setattr(pretraining, "find_start", start)
    monkeypatch.setattr(pretraining, "_free_memory", lambda: None)  # takes a second with transformers in memory
    return world


def growths(world, *steps):
    recipes = [str(world["folder"] / f"{name}.yaml") for name in ("first", "second")]
    return [
        {"at_step": step, "recipe": recipe, "rewarmup_steps": 1} for step, recipe in zip(steps, recipes, strict=False)
    ]


def grown(world, output, *steps, **changes):
    schedule = {"train_steps": 8, "learning_rate": 0.1, "warmup_steps": 2}
    return settings(world, output, **{"schedule": schedule, "growth": growths(world, *steps), **changes})


def test_stages_follow_each_other_and_each_boundary_is_saved(world, capsys):
    run = grown(world, "run", 2, 5)
    outcome = pretrain(run)
    assert (outcome.position.step, outcome.position.stage, outcome.stopped) == (8, 2, False)
    assert [engine.steps for engine in world["engines"]] == [2, 3, 3] and all(e.closed for e in world["engines"])
    assert names(run) == [f"step_{step:08d}" for step in (2, 3, 5, 6, 8)]
    rows = [(item["kind"], item["step"], item["stage"]) for item in curve(run) if item["kind"] != "train"]
    assert rows == [
        ("evaluation", 0, 0), ("evaluation", 2, 0), ("growth", 2, 1), ("evaluation", 2, 1), ("evaluation", 4, 1),
        ("evaluation", 5, 1), ("growth", 5, 2), ("evaluation", 5, 2), ("evaluation", 6, 2), ("evaluation", 8, 2),
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "stage 1: steps 3 to 5; llama, " in shown and f"teacher {run.output}" not in shown
    assert "step 2/8  grown from " in shown and "first.yaml, which keeps the function, in " in shown
    assert "finished after step 8 of 8" in shown and shown.count("finished") == 1


OTHER_STOPS = (pytest.param(when, marks=pytest.mark.slow) for when in (1, 3, 4, 7))


@pytest.mark.parametrize("when", [2, 5, 6, *OTHER_STOPS])
def test_a_run_that_is_stopped_in_any_stage_goes_on_as_if_it_had_not_stopped(world, when):
    """The stop comes while the step of that number is taken, counted over all stages."""
    whole, parts = grown(world, "whole", 2, 5), grown(world, "parts", 2, 5)
    pretrain(whole)
    bounds = [0, 2, 5, 8]
    stage = max(number for number, bound in enumerate(bounds[:-1]) if bound < when)
    calls = []

    def on_step(step, number):
        calls.append(step)
        return stop_at(when)(len(calls), number)

    world["on_step"] = on_step
    outcome = stoppable(parts)
    assert (outcome.stopped, outcome.position.step, outcome.position.stage) == (True, when, stage)
    built = len(world["engines"])
    world["on_step"] = lambda step, number: number
    assert pretrain(parts).position == pretrain(whole).position
    assert curve(parts) == curve(whole)
    # At a boundary the evaluation that the stop prevented comes first; elsewhere the stage goes on.
    assert world["engines"][built].steps == bounds[stage + 1] - when


def test_a_run_that_is_killed_in_a_growth_again_and_again_keeps_one_row_of_everything(world, monkeypatch):
    """The stop at the boundary prevented its evaluation, which every attempt repeats."""
    whole, parts = grown(world, "whole", 2), grown(world, "parts", 2)
    pretrain(whole)
    world["on_step"] = stop_at(2)
    stoppable(parts)
    world["on_step"] = lambda step, number: number
    for _ in range(2):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(loop, "train_step", interrupted)
            pretrain(parts)
    pretrain(parts)
    assert curve(parts) == curve(whole)


def interrupted(*arguments):
    raise KeyboardInterrupt


def test_a_run_resumed_after_a_growth_does_not_open_what_it_was_grown_from(world):
    run = grown(world, "run", 2)
    world["on_step"] = stop_at(3)
    stoppable(run)
    world["opened"].clear()
    world["on_step"] = lambda step, number: number
    assert pretrain(run).position.step == 8
    assert world["opened"] == []


def stopped_after_growth(world, output="run"):
    calls = []
    world["on_step"] = lambda step, number: calls.append(step) or stop_at(4)(len(calls), number)
    assert stoppable(grown(world, output, 2, 6)).position.step == 4
    world["on_step"] = lambda step, number: number


def test_a_growth_that_happened_cannot_be_changed(world):
    stopped_after_growth(world)
    message = (
        r"step_00000004: the run has grown otherwise:\n  growth.0.at_step: 2 there, 3 in this run file\n"
        r"Restore the section growth, or start a new run: .* and schedule.start_step 4\."
    )
    with pytest.raises(ConfigError, match=message):
        pretrain(grown(world, "run", 3, 6))
    other = [{**growths(world, 2)[0], "recipe": str(world["folder"] / "second.yaml")}]
    with pytest.raises(ConfigError, match=r"growth.0.recipe: .*first.yaml there, .*second.yaml in this run file"):
        pretrain(grown(world, "run", growth=other))
    with pytest.raises(ConfigError, match=r"growth.0.at_step: 2 there, none in this run file"):
        pretrain(grown(world, "run"))
    rows = read_metrics(pretraining.Path(world["folder"]) / "run" / "metrics.jsonl")
    assert rows[-1]["step"] == 4, "a refused run keeps its metrics"


def test_a_growth_that_the_run_has_passed_cannot_be_added(world):
    run = grown(world, "run")
    world["on_step"] = stop_at(4)
    stoppable(run)
    with pytest.raises(ConfigError, match=r"growth.0.at_step: 3, but the run took 4 steps without it"):
        pretrain(grown(world, "run", 3))


def test_a_growth_to_come_may_be_changed_and_that_is_said(world, capsys):
    stopped_after_growth(world)
    assert pretrain(grown(world, "run", 2, 7)).position.stage == 2
    assert "changed settings: growth.1.at_step: 6 -> 7" in capsys.readouterr().out
    stopped_after_growth(world, "less")
    assert pretrain(grown(world, "less", 2)).position.stage == 1


def test_a_change_is_said_also_if_the_run_resumes_right_at_a_growth(world, capsys):
    world["on_step"] = stop_at(2)
    stoppable(grown(world, "run", 2, 6, evaluation=None))
    world["on_step"] = lambda step, number: number
    pretrain(grown(world, "run", 2, 7, evaluation=None))
    assert [engine.steps for engine in world["engines"]] == [2, 5, 1], "the small model is not built again"
    assert "changed settings: growth.1.at_step: 6 -> 7" in capsys.readouterr().out


def test_a_model_file_changed_behind_a_growth_is_refused(world):
    stopped_after_growth(world)
    recipe = {"target": {"num_hidden_layers": 5}, "depth": {"method": "append"}}
    (world["folder"] / "first.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="model config num_hidden_layers: 4 there, 5 in this run"):
        pretrain(grown(world, "run", 2, 6))


def test_a_run_that_begins_at_a_later_step_takes_the_data_and_rates_of_that_step(world):
    pretrain(grown(world, "whole"))
    schedule = {"train_steps": 8, "learning_rate": 0.1, "warmup_steps": 2}
    late = settings(world, "late", schedule={**schedule, "start_step": 3})
    assert pretrain(late).position.tokens == 8 * 4 * 8
    of_late, of_whole = ([i for i in curve(run) if i["kind"] == "train"] for run in (late, grown(world, "whole")))
    assert [i["step"] for i in of_late] == [4, 5, 6, 7, 8]
    for key in ("learning_rate", "consumed_samples", "tokens"):
        assert [i[key] for i in of_late] == [i[key] for i in of_whole[3:]]
    assert of_late[0]["flops"] == of_whole[0]["flops"]  # its own alone
    with pytest.raises(ConfigError, match="schedule.start_step: 3 there, 2 in this run file"):
        pretrain(settings(world, "late", schedule={**schedule, "start_step": 2}))


def test_a_large_model_that_diverges_names_its_own_keys_and_the_boundary(world):
    run = grown(world, "run", 4, checkpoint={"interval": 100, "keep_last": 1})
    calls = []
    world["on_step"] = lambda step, number: calls.append(step) or (math.nan if len(calls) == 6 else 4.0)
    message = r"step 6: .* Lower growth.0.learning_rate or lengthen growth.0.rewarmup_steps; .*step_00000004\."
    with pytest.raises(DivergedError, match=message):
        pretrain(run)
    world["on_step"] = lambda step, number: 4.0
    assert pretrain(run).position.step == 8


def test_the_checkpoint_that_a_stage_is_grown_from_stays(world):
    run = grown(world, "run", 2, checkpoint={"interval": 1, "keep_last": 1})
    pretrain(run)
    assert names(run) == ["step_00000002", "step_00000008"]
    facts = json.loads((pretraining.Path(run.output) / "checkpoints/step_00000008/manifest.json").read_text())["facts"]
    assert facts["position"]["stage"] == 1 and facts["settings"]["growth"][0]["at_step"] == 2
