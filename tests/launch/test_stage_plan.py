"""The stages of a run that grows are planned, and refused, before anything trains."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from token_data import write_documents

from incr_ds.config.fields import merged, parse_settings
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError, GrowthError, IncrError, LayoutError
from incr_ds.launch.preflight import check_model, check_run
from incr_ds.launch.stages import first_architecture, plan_stages
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.runs import pico_run

ROOT = Path(__file__).parents[2]
COSINE = {"train_steps": 200, "learning_rate": 0.01, "warmup_steps": 10, "min_learning_rate": 0.001}


@pytest.fixture
def folder(tmp_path):
    write_documents(tmp_path / "x", [[1, 2, 3]])
    architecture = small_architecture("llama", num_key_value_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(dict(architecture.config)))
    write_recipe(tmp_path, "deep", target={"num_hidden_layers": 6})
    write_recipe(tmp_path, "wide", target={"hidden_size": 192})
    return tmp_path


def write_recipe(folder, name, **content):
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))


def run_of(folder, *growth, **changes):
    """``growth`` are (step, recipe, further keys)."""
    content = {
        "output": str(folder / "run"),
        "precision": "fp32",
        "model": {"config": str(folder / "config.json")},
        "layout": {"data_parallel": 2},
        "batch": {"sequence_length": 12, "micro_batch_size": 2, "global_batch_size": 8},
        "schedule": COSINE,
        "data": {"train": [{"prefix": str(folder / "x")}]},
        "checkpoint": {"interval": 50},
        "growth": [{"at_step": step, "recipe": str(folder / f"{name}.yaml"), **more} for step, name, more in growth],
    }
    return parse_settings(merged(content, changes), RunSettings, "test")


def planned(run):
    return plan_stages(run, first_architecture(run))


def test_every_stage_is_an_ordinary_run_of_its_part_of_the_schedule(folder):
    run = run_of(
        folder,
        (50, "deep", {"rewarmup_steps": 4, "rewarmup_from": 0.5, "learning_rate": 0.02}),
        (120, "wide", {"rewarmup_steps": 0, "layout": {"pipeline_parallel": 2}, "micro_batch_size": 1}),
    )
    first, second, third = planned(run)
    assert [(stage.first_step, stage.last_step) for stage in (first, second, third)] == [(0, 50), (50, 120), (120, 200)]
    assert [stage.architecture.num_layers for stage in (first, second, third)] == [3, 6, 6]
    assert [stage.architecture.sizes["hidden"] for stage in (first, second, third)] == [96, 96, 192]
    assert first.run == run.model_copy(
        update={"growth": [], "schedule": run.schedule.model_copy(update={"end_step": 50})}
    )
    assert second.run.schedule.model_dump() == {
        **run.schedule.model_dump(), "start_step": 50, "end_step": 120, "learning_rate": 0.02,
        "rewarmup_steps": 4, "rewarmup_from": 0.5,
    }  # fmt: skip
    assert second.run.model.initialize_from.source == str(folder / "run" / "checkpoints" / "step_00000050")
    assert second.run.layout == run.layout and second.run.accumulation_steps == 2
    # What a growth states holds until the next one states otherwise.
    assert (third.run.schedule.learning_rate, third.run.schedule.rewarmup_steps) == (0.02, 0)
    assert third.run.layout.pipeline_parallel == 2 and third.run.accumulation_steps == 8
    assert third.run.model.initialize_from.source == str(folder / "run" / "checkpoints" / "step_00000120")


def test_a_run_without_growth_is_its_only_stage(folder):
    run = run_of(folder)
    (stage,) = planned(run)
    assert stage.run is run and stage.plan is None


BEFORE = {"teacher": "before-growth", "anneal_steps": 20}


def test_the_teacher_before_growth_is_each_boundary_and_a_folder_teaches_on(folder):
    run = run_of(folder, (50, "deep", {}), (120, "wide", {}), distillation=BEFORE)
    taught = [stage.run.distillation for stage in planned(run)]
    checkpoints = folder / "run" / "checkpoints"
    assert taught[0] is None
    assert [(one.teacher, one.start_step) for one in taught[1:]] == [
        (str(checkpoints / "step_00000050"), 50), (str(checkpoints / "step_00000120"), 120),
    ]  # fmt: skip
    own = {"teacher": "elsewhere", "anneal_steps": 100}
    run = run_of(folder, (50, "deep", {"distillation": own}), (120, "wide", {}), distillation=BEFORE)
    taught = [stage.run.distillation for stage in planned(run)]
    assert taught[0] is None and [(one.teacher, one.start_step) for one in taught[1:]] == [("elsewhere", 50)] * 2
    run = run_of(folder, (50, "deep", {"distillation": "none"}), distillation=own)
    taught = [stage.run.distillation for stage in planned(run)]
    assert taught[0].teacher == "elsewhere" and taught[1] is None


def test_a_run_that_begins_with_a_growth_on_load_is_taught_by_its_source(folder):
    drawn_model(small_architecture("llama"), None).float().save_pretrained(folder / "source")
    write_recipe(folder, "reset", target={"num_hidden_layers": 4}, optimizer="reset")
    model = {"initialize_from": {"source": str(folder / "source"), "recipe": str(folder / "reset.yaml")}}
    run = run_of(folder, distillation=BEFORE, model={"config": None, **model})
    (stage,) = planned(run)
    assert stage.run.distillation.teacher == str(folder / "source") and stage.architecture.num_layers == 4


def test_without_a_stated_re_warm_up_the_growths_advice_decides_and_says_so(folder):
    write_recipe(folder, "reset", target={"num_hidden_layers": 6}, optimizer="reset")
    run = run_of(folder, (50, "wide", {}), (120, "deep", {}))
    _, wide, deep = planned(run)
    # Copies keep their moments: no re-warm-up. New layers have estimated ones: 2 / (1 - 0.95) steps from a tenth.
    assert (wide.run.schedule.rewarmup_steps, deep.run.schedule.rewarmup_steps) == (0, 40)
    assert deep.run.schedule.rewarmup_from == 0.1
    assert "advised for this growth: moments continue where the source's stopped" in wide.rewarmup
    assert "new entries have estimated moments, or none; 0.1 is a cautious choice" in deep.rewarmup
    _, reset = planned(run_of(folder, (50, "reset", {})))
    assert reset.run.schedule.rewarmup_from == 0.0 and "the moments start at zero" in reset.rewarmup


@pytest.mark.parametrize(
    ("growth", "changes", "message"),
    [
        ([(120, "deep", {}), (50, "wide", {})], {}, "growth.1.at_step 50 is not after 120, the step of the growth before"),
        ([(50, "deep", {}), (50, "wide", {})], {}, "growth.1.at_step 50 is not after 50"),
        ([(200, "deep", {})], {}, "growth.0.at_step 200 is not inside of the run, which trains from step 0 to step 200"),
        ([(50, "deep", {})], {"schedule": {"start_step": 60}}, "growth.0.at_step 50 is not inside .* from step 60 to step"),
        ([(50, "deep", {})], {"schedule": {"end_step": 50}}, "growth.0.at_step 50 is not inside .* from step 0 to step 50"),
        (
            [(50, "deep", {"layout": {"data_parallel": 4}})],
            {},
            "growth.0.layout needs 4 processes, but layout has 2; the same processes train every stage",
        ),
        ([(50, "deep", {"rewarmup_from": 0.5})], {}, "rewarmup_from 0.5 needs rewarmup_steps"),
        ([(50, "deep", {"batch": 3})], {}, "growth.0.batch: unknown key"),
        ([], {"distillation": BEFORE}, "distillation.teacher: before-growth needs a growth: the section growth, or"),
        (
            [],
            {"distillation": BEFORE, "model": {"config": None, "tag": "t", "initialize_from": {"source": "a", "recipe": "b"}}},
            "before-growth reads the source's latest tag, but model.tag is t; let the source's file latest name that tag",
        ),
        ([(50, "deep", {})], {"distillation": {**BEFORE, "start_step": 0}}, "start_step 0: with teacher: before-growth the"),
    ],
)  # fmt: skip
def test_a_growth_that_does_not_belong_to_the_run_is_refused_with_the_run_file(folder, growth, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_of(folder, *growth, **changes)


WRONG_RECIPES = {
    "smaller": ({"target": {"num_hidden_layers": 2}}, GrowthError, "growth.1: .*num_hidden_layers"),
    "divides": ({"target": {"num_attention_heads": 7}}, GrowthError, "growth.1: .*wrong.yaml"),
    "unknown": ({"target": {"hiden_size": 192}}, IncrError, "growth.1: .*hiden_size.*did you mean hidden_size"),
    "not exact": (
        {"target": {"num_hidden_layers": 8}, "depth": {"new": "copy"}, "function_preserving": "required"},
        GrowthError,
        "growth.1: .*function_preserving: required, but",
    ),
    "layout": (
        {"target": {"num_hidden_layers": 8}, "layout": {"data_parallel": 1}},
        LayoutError,
        r"growth.1: .*layout states data_parallel 1 \(this run: 2\). The run file decides",
    ),
}


@pytest.mark.parametrize("name", WRONG_RECIPES)
def test_a_wrong_recipe_of_a_later_growth_is_refused_before_the_run_starts(folder, name):
    content, kind, message = WRONG_RECIPES[name]
    write_recipe(folder, "wrong", **content)
    with pytest.raises(kind, match=f"(?s){message}"):
        check_run(run_of(folder, (50, "deep", {}), (120, "wrong", {})))
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("growth", "changes", "kind", "message"),
    [
        ((50, "gone", {}), {}, ConfigError, "growth.0: .*gone.yaml: cannot be read"),
        ((50, "deep", {"micro_batch_size": 3}), {}, ConfigError, "(?s)growth.0: .*8 is not a multiple of micro_batch_size 3"),
        (
            (195, "deep", {}),
            {},
            ConfigError,
            r"(?s)growth.0: the run from step 195 on \(the re-warm-up is the advised one; state rewarmup_steps for another"
            r"\): 1 problem.*rewarmup_steps 40 exceed the 5 steps from 195 to 200",
        ),
        (
            (50, "deep", {"layout": {"data_parallel": 2, "zero_stage": 0}}),
            {},
            ConfigError,
            "growth.0: layout.zero_stage 0: training needs 1, 2 or 3",
        ),
        ((50, "heads", {"layout": {"tensor_parallel": 2}}), {}, LayoutError, "(?s)growth.0: .*num_key_value_heads 3 does not"),
        ((50, "deep", {}), {"model": {"freeze": ["model.layers.9.*"]}}, ConfigError, "model.layers.9.* matches no tensor"),
        (
            (50, "vocabulary", {"rewarmup_steps": 1}),
            {"distillation": BEFORE},
            ConfigError,
            "growth.0: distillation.teacher: its vocabulary has 101 entries, the model's 128",
        ),
        ((50, "mixture", {}), {"loss": {"router": 0.1}}, ConfigError, "loss.router: 0.1: a llama has no router"),
    ],
)  # fmt: skip
def test_a_stage_that_could_not_be_trained_is_refused_before_the_run_starts(folder, growth, changes, kind, message):
    write_recipe(folder, "vocabulary", target={"vocab_size": 128})
    write_recipe(folder, "heads", target={"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3})
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    write_recipe(folder, "mixture", target=mixture, optimizer="reset", layout={"format": "huggingface"})
    with pytest.raises(kind, match=message):
        check_model(run_of(folder, growth, **changes))


def test_a_missing_teacher_of_a_stage_is_named(folder):
    own = {"distillation": {"teacher": str(folder / "nowhere"), "anneal_steps": 5}}
    with pytest.raises(ConfigError, match=r"growth.0.distillation.teacher: .*nowhere: no such folder"):
        check_run(run_of(folder, (50, "deep", own)))


def test_print_config_shows_every_stage_as_comments_of_a_run_file_that_loads_again(folder):
    run = run_of(folder, (50, "wide", {}), (120, "deep", {"layout": {"pipeline_parallel": 2}}), distillation=BEFORE)
    (folder / "run.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    command = [sys.executable, ROOT / "launchers" / "pretrain.py", "--config", folder / "run.yaml", "--print-config"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert shown.returncode == 0, shown.stderr
    assert RunSettings.model_validate(yaml.safe_load(shown.stdout)) == run
    stages = [line for line in shown.stdout.splitlines() if line.startswith("# stage ")]
    assert len(stages) == 3
    assert stages[0].startswith("# stage 0: steps 1 to 50; llama, 272,928") and stages[0].endswith("; no teacher")
    assert f"grown from 272,928 by {folder}/wide.yaml, which keeps the function" in stages[1]
    assert "re-warm-up none (advised for this growth: moments continue" in stages[1]
    assert "steps 121 to 200" in stages[2] and "tensor 1 x pipeline 2 x data 1" in stages[2]
    assert "re-warm-up 40 steps from 0.1 of the rate (advised for this growth: new entries" in stages[2]
    assert f"teacher {folder}/run/checkpoints/step_00000120, weight 0.5" in stages[2]


def test_pico_runs_have_no_growth():
    assert pico_run().growth == []
