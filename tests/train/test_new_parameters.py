"""Layers that a growth added train at a rate of their own, by optimizer.new_parameters."""

import json

import pytest
import torch
import yaml
from new_parameter_runs import RATE, RATIO, SETTINGS, train_everything
from progressive_runs import content_of, settings_of
from token_data import write_random_documents

from incr_ds.arch.multipliers import (
    NEW,
    Multipliers,
    multipliers_text,
    read_multipliers,
    without_marks,
    without_multipliers,
)
from incr_ds.checkpoint.opening import open_source
from incr_ds.config.fields import parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.optimizer import NewParameterSettings
from incr_ds.errors import ConfigError
from incr_ds.growth.multipliers import grown_multipliers
from incr_ds.growth.planner import plan_growth
from incr_ds.launch.stages import check_new_parameters
from incr_ds.testing.memory import small_architecture
from incr_ds.testing.processes import run_processes
from incr_ds.train.metrics import read_metrics
from incr_ds.train.resuming import _other_groups
from incr_ds.train.schedule import new_parameters_ratio


def grown(architecture, earlier=None, **content):
    recipe = parse_settings({"target": {}, **content}, GrowthRecipe, "test")
    plan = plan_growth(architecture, recipe, "test")
    return plan.target, grown_multipliers(plan, earlier or {})


def new_layers(multipliers):
    return {int(name.split(".")[2]) for name, own in multipliers.items() if own.new}


def test_the_factor_rises_over_the_first_steps():
    settings = NewParameterSettings(learning_rate_ratio=2.0, warmup_steps=3, warmup_from=0.2)
    ratios = [new_parameters_ratio(settings, taken) for taken in range(5)]
    assert ratios == pytest.approx([2 * 0.4, 2 * 0.6, 2 * 0.8, 2.0, 2.0])
    assert new_parameters_ratio(NewParameterSettings(learning_rate_ratio=0.5), 0) == 0.5


@pytest.mark.parametrize("optimizer", ["rescale", "copy", "reset-new", "reset"])
def test_the_newest_growth_in_depth_marks_its_layers(optimizer):
    small = small_architecture("llama", num_hidden_layers=2)
    large, first = grown(small, target={"num_hidden_layers": 4}, optimizer=optimizer)
    assert new_layers(first) == {1, 3} and sum(own.new for own in first.values()) == 2 * 9
    same, kept = grown(large, first, optimizer=optimizer)
    assert kept == first and same.num_layers == 4
    _, wider = grown(large, first, target={"intermediate_size": large.sizes["ffn"] * 2}, optimizer=optimizer)
    assert new_layers(wider) == {1, 3}
    _, again = grown(large, first, target={"num_hidden_layers": 5}, depth={"method": "append"}, optimizer=optimizer)
    assert new_layers(again) == {4}


def test_a_width_growth_marks_nothing():
    small = small_architecture("llama", num_hidden_layers=2)
    _, found = grown(small, target={"hidden_size": 144})
    assert found and not any(own.new for own in found.values())


def test_the_file_says_what_is_new(tmp_path):
    given = {"a": NEW, "b": Multipliers(2.0, 0.5, 0.5), "c": Multipliers(2.0, 0.5, 0.5, new=True)}
    (tmp_path / "multipliers.json").write_text(multipliers_text(given))
    assert read_multipliers(tmp_path) == given
    assert without_marks(given) == {name: Multipliers(2.0, 0.5, 0.5) for name in "bc"}
    # Without new layers the file is what earlier releases read.
    assert '"new"' not in multipliers_text({"b": given["b"]})


def test_a_saved_group_gives_the_run_files_rate():
    group = {
        "lr": 0.3 * 2.0 * 0.25,
        "eps": 1.0,
        "multipliers": {"lr": 2.0, "eps": 1.0, "weight_decay": 0.5, "new": True},
    }
    assert without_multipliers({**group, "new_parameters_ratio": 0.25}) == {"lr": pytest.approx(0.3), "eps": 1.0}


def test_what_is_not_new_cannot_have_a_rate_of_its_own(tmp_path):
    run = settings_of(content_of(tmp_path, "x", optimizer={"new_parameters": SETTINGS}))
    with pytest.raises(ConfigError, match=r"optimizer.new_parameters: nothing is new: .*config.json.*grow in depth"):
        check_new_parameters(run, (), {"a": Multipliers(2.0, 1.0, 0.5)})
    check_new_parameters(run, (), {"a": NEW})
    plain = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"new_parameters": None})})
    check_new_parameters(plain, (), {})


def test_resuming_may_change_the_rate_and_not_the_groups():
    none, some, other = ({"optimizer": {"new_parameters": value}} for value in (None, {"warmup_steps": 1}, {}))
    assert not [*_other_groups(some, other), *_other_groups({"optimizer": {}}, none)]
    assert list(_other_groups(some, none)) == ["optimizer.new_parameters: set there, not set in this run file"]
    assert list(_other_groups(none, some)) == ["optimizer.new_parameters: not set there, set in this run file"]


@pytest.fixture(
    scope="module",
    params=[{"data_parallel": 2, "zero_stage": 2}, {"pipeline_parallel": 2}, {"tensor_parallel": 2}],
    ids=["zero2", "pipeline", "tensor"],
)
def runs(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("new")
    write_random_documents(folder, documents=30, length=50)
    (folder / "config.json").write_text(
        json.dumps(dict(small_architecture("llama", num_hidden_layers=2, num_key_value_heads=2).config))
    )
    recipe = {"target": {"num_hidden_layers": 4}, "depth": {"new": "copy"}, "layout": request.param}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"function_preserving": "preferred"}))
    run_processes(train_everything, 2, str(folder), request.param)
    return folder


def at(folder, output, step):
    return open_source(folder / output / f"checkpoints/step_{step:08d}")


def largest_changes(folder, output, first, second):
    """The largest change of any element between two checkpoints, in new layers and in the others."""
    before, after = at(folder, output, first), at(folder, output, second)
    changes = {True: 0.0, False: 0.0}
    for spec in after.architecture.stored:
        change = (after.read(spec.name).double() - before.read(spec.name).double()).abs().max().item()
        is_new = spec.layer in (1, 3)
        changes[is_new] = max(changes[is_new], change)
    return changes


@pytest.mark.slow
def test_adams_first_step_moves_each_group_by_its_own_rate(runs):
    """At its first step Adam moves every element by the learning rate, whatever its gradient."""
    grown_folder = open_source(runs / "grown")
    first = at(runs, "calm", 1)
    for spec in first.architecture.stored:
        moved = (first.read(spec.name).double() - grown_folder.read(spec.name).double()).abs().max().item()
        ratio = RATIO * (0.1 + 0.9 / 3) if spec.layer in (1, 3) else 1.0
        assert moved == pytest.approx(RATE * ratio, rel=2e-3), spec.name


@pytest.mark.slow
def test_the_rate_is_in_the_metrics_and_a_stop_changes_nothing(runs):
    expected = [RATE * RATIO * share for share in (0.4, 0.7, 1.0, 1.0)]
    for output in ("calm", "stopped", "from_grown"):
        rows = [item for item in read_metrics(runs / output / "metrics.jsonl") if item["kind"] == "train"]
        assert [item["new_learning_rate"] for item in rows] == pytest.approx(expected)
        assert [item["learning_rate"] for item in rows] == [RATE] * 4
    calm = at(runs, "calm", 4)
    for other in (at(runs, "stopped", 4), at(runs, "from_grown", 4)):
        for spec in calm.architecture.stored:
            for state in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.equal(calm.read(spec.name, state), other.read(spec.name, state)), (spec.name, state)


@pytest.mark.slow
def test_a_run_without_the_key_trains_all_alike_and_keeps_the_marks(runs):
    changes = largest_changes(runs, "plain", 1, 2)
    assert changes[True] <= 1.5 * changes[False]
    assert {item["new_learning_rate"] for item in read_metrics(runs / "plain" / "metrics.jsonl")} == {None}
    assert new_layers(read_multipliers(runs / "plain/checkpoints/step_00000004")) == {1, 3}
    later = [item for item in read_metrics(runs / "later" / "metrics.jsonl") if item["kind"] == "train"]
    assert [item["new_learning_rate"] for item in later] == pytest.approx([RATE * RATIO * 0.4])
    marks = read_multipliers(runs / "later/checkpoints/step_00000001")
    assert marks == read_multipliers(runs / "plain/checkpoints/step_00000004")
