"""The runs that a study file becomes: positions, checkpoints, data order and FLOPs, by hand."""

from pathlib import Path

import pytest
from studies import TARGET, tiny_study

from incr_ds.config.fields import load_settings, parse_settings
from incr_ds.config.growth import GrowthRecipe
from incr_ds.config.study import StudySettings
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError
from incr_ds.growth.planner import plan_growth
from incr_ds.study.design import StudyJob, jobs, open_design
from incr_ds.study.execution import assumed
from incr_ds.study.probe import probe_jobs

ROOT = Path(__file__).parents[2]


def by_name(settings: StudySettings) -> dict[str, StudyJob]:
    return {job.name: job for job in jobs(assumed(settings))}


def test_positions_follow_from_tokens_per_parameter(tmp_path):
    found = by_name(tiny_study(tmp_path))
    # 64 tokens a step: 10 tokens per parameter are 2888 x 10 / 64 = 451 steps, 20 are 902 (rounded). The last fifth is decay.
    assert (TARGET, 451, 902) == (2888, round(2888 * 10 / 64), round(2888 * 20 / 64))
    scratch = found["scratch/seed0-lr0.01/trunk"].run
    assert scratch["checkpoint"]["keep_steps"] == [451 - 90, 902 - 180] and scratch["schedule"]["train_steps"] == 722
    branch = found["scratch/seed0-lr0.01/branch-902"]
    assert branch.run["schedule"] == {"train_steps": 180, "learning_rate": 0.01, "decay": "wsd", "decay_steps": 180}
    assert branch.run["data"]["start_sample"] == 722 * 4
    assert branch.start == tmp_path / "out/scratch/seed0-lr0.01/trunk/checkpoints/step_00000722"


def test_a_grown_trunk_starts_where_its_source_stands(tmp_path):
    found = by_name(tiny_study(tmp_path))
    # Budget 20: growth at half of its tokens, step 451 of the source's trunk, which keeps it. Branches end at 722 and 902.
    trunk = found["stack/seed1-lr0.01-budget20/trunk"]
    source = found["source/seed1-lr0.02/trunk"]
    assert 451 in source.run["checkpoint"]["keep_steps"]
    assert trunk.start == source.final.with_name("step_00000451") and trunk.before == (trunk.start,)
    assert trunk.run["data"]["start_sample"] == 451 * 4 and trunk.run["seed"] == 1
    assert trunk.run["checkpoint"]["keep_steps"] == [722 - 144 - 451, 902 - 180 - 451]
    assert trunk.recipe == {"depth": {"method": "stack", "new": "copy"}, "target": {"num_hidden_layers": 4}}
    branch = found["stack/seed1-lr0.01-budget20/branch-902"]
    assert branch.run["data"]["start_sample"] == 722 * 4 and branch.of_source == 1
    assert branch.before == (trunk.start, branch.start)
    assert branch.start == trunk.final.with_name(f"step_{722 - 451:08d}")


def test_flops_are_those_of_a_hand_count(tmp_path):
    found = by_name(tiny_study(tmp_path))
    # Per token: 6 for each element of a matrix (the tied output's 256 counted), 12 x layers x heads x head_dim x length.
    per_token = 6 * (256 + 4 * (256 + 384)) + 12 * 4 * 8 * 16
    assert found["scratch/seed0-lr0.01/branch-902"].flops == 180 * 64 * per_token


def test_only_the_first_seed_tries_all_rates(tmp_path):
    names = list(by_name(tiny_study(tmp_path)))
    assert "source/seed0-lr0.01/trunk" in names and "source/seed0-lr0.02/trunk" in names
    assert "source/seed1-lr0.02/trunk" in names and "source/seed1-lr0.01/trunk" not in names
    seeds = [name.split("seed")[1][0] for name in names]
    assert seeds == sorted(seeds)  # the first seed of every arm comes first


def test_until_a_rate_is_chosen_what_depends_on_it_waits(tmp_path):
    undecided = open_design(tiny_study(tmp_path), lambda arm: None if arm == "source" else 0.01)
    names = [job.name for job in jobs(undecided)]
    assert not any(name.startswith(("stack", "source/seed1")) for name in names)
    assert "source/seed0-lr0.02/branch-902" in names


def test_every_run_file_is_valid(tmp_path):
    for name, job in by_name(tiny_study(tmp_path)).items():
        run = parse_settings(job.run, RunSettings, name)
        assert run.schedule.train_steps == job.steps


def test_a_probe_is_the_beginning_of_the_trunks(tmp_path):
    design = open_design(tiny_study(tmp_path), lambda arm: None)
    found = {job.name: job for job in probe_jobs(design, 100)}
    # The undecided source takes its first rate, up to the growth at half of the largest budget.
    assert list(found) == ["source/seed0-lr0.01/trunk", "stack/seed0-lr0.01-budget20/trunk"]
    source, trunk = found.values()
    assert source.steps == source.run["schedule"]["train_steps"] == 451 and trunk.start == source.final
    whole = by_name(tiny_study(tmp_path))[trunk.name]
    assert trunk.steps == 100 and trunk.run["checkpoint"] == whole.run["checkpoint"]
    assert trunk.flops == pytest.approx(whole.flops * 100 / whole.steps)
    with pytest.raises(
        ConfigError, match=r"--probe 900: stack/seed0-lr0.01-budget20/trunk has only 271 steps; probe fewer"
    ):
        probe_jobs(design, 900)


def test_a_decayed_source_is_a_branch_of_its_arm(tmp_path):
    late = {
        "model": "large",
        "purpose": "X",
        "learning_rates": [0.01],
        "growth": {"source": "source", "at": 0.5, "recipe": {}, "decayed": True},
        "budgets": [20],
    }
    found = by_name(tiny_study(tmp_path, sunk=late))
    assert found["sunk/seed0-lr0.01-budget20/trunk"].start == found["source/seed0-lr0.02/branch-451"].final
    assert found["sunk/seed0-lr0.01-budget20/trunk"].of_source == 2  # the source's trunk and its branch
    with pytest.raises(
        ConfigError, match=r"arms.sunk.growth: source has no branch that ends at 0.5 of the budget 16; add"
    ):
        by_name(tiny_study(tmp_path, sunk={**late, "budgets": [16]}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": {"model": "huge"}}, r"arms.stack.model: 'huge' is not defined; known: large, small"),
        ({"stack": {"growth": {"source": "none"}}}, r"arms.stack.growth.source: 'none' is not an arm above stack"),
        (
            {"stack": {"growth": {"at": 0.7}}},
            r"arms.stack: growth.at 0.7 is not before the decay of the first branch.*0.64",
        ),
        ({"stack": {"branches": [1.0, 0.5]}}, r"expected ascending fractions of the budget, above 0 and at most 2"),
        ({"source": {"seeds": [0]}}, r"arms.stack.seeds: \[1\] are not seeds of its source source"),
        ({"scratch": {"model": "small"}}, r"arms.scratch: expected an arm that trains large without growth"),
    ],
)
def test_a_study_that_cannot_be_is_refused(tmp_path, changes, message):
    arms = tiny_study(tmp_path).model_dump(exclude_unset=True)["arms"]
    for arm, own in changes.items():
        growth = {**arms[arm].get("growth", {}), **own.get("growth", {})}
        arms[arm] = {**arms[arm], **own, **({"growth": growth} if growth else {})}
    with pytest.raises(ConfigError, match=message):
        tiny_study(tmp_path, **arms)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"common": {"batch": {}}}, r"common: no section data; expected the run-file sections that all runs share"),
        (
            {"common": {"batch": {}, "data": {}, "schedule": {}}},
            r"common: schedule: the study decides this for every run",
        ),
        ({"common": {"batch": {"sequence_length": 8}, "data": {}}}, r"micro_batch_size"),
        ({"tokens_per_parameter": [0]}, r"tokens_per_parameter.0: Input should be greater than or equal to 1, found 0"),
        (
            {"seeds": [1, 2], "arms": {"scratch": {"seeds": [7]}}},
            r"arms.scratch.seeds: \[7\] are not among the study's",
        ),
    ],
)
def test_settings_of_a_study_are_checked(tmp_path, changes, message):
    content = tiny_study(tmp_path).model_dump(exclude_unset=True)
    content["arms"]["scratch"] |= changes.pop("arms", {}).get("scratch", {})
    with pytest.raises(ConfigError, match=message):
        parse_settings({**content, **changes}, StudySettings, "study.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs/studies").glob("*.yaml")), ids=lambda path: path.name)
def test_every_study_of_the_project_is_valid(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = jobs(assumed(load_settings(path, StudySettings)))
    assert len(planned) > 5
    for job in planned:
        parse_settings(job.run, RunSettings, job.name)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs/studies").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_a_study_grows_its_source_into_the_target(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    design = assumed(load_settings(path, StudySettings))
    for job in jobs(design):
        if job.recipe is not None:
            growth = design.study.arms[job.trunk.arm].growth
            source = design.models[design.study.arms[growth.source].model]
            recipe = parse_settings(job.recipe, GrowthRecipe, job.name)
            assert plan_growth(source, recipe, job.name).target.sizes == design.models[design.study.target].sizes
