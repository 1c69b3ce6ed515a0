"""A study that goes on from the summary of an earlier one: what that measured is not run again, and counts the same."""

import json

import pytest
from studies import tiny_study
from test_summary import write_result, write_results

from incr_ds.config.study import StudySettings
from incr_ds.errors import ConfigError
from incr_ds.study.design import jobs
from incr_ds.study.execution import is_done, opened
from incr_ds.study.pages import write_study_report
from incr_ds.study.summary import bands, collect, early_losses


@pytest.fixture
def earlier(tmp_path):
    """The results of seeds 0 and 1, and the content of a study file with one more seed that knows them."""
    results = write_results(tiny_study(tmp_path))
    write_study_report(results, tmp_path / "report", "command")
    content = tiny_study(tmp_path).model_dump(mode="json", exclude_unset=True)
    content |= {"output": str(tmp_path / "other"), "seeds": [0, 1, 2], "known": [str(tmp_path / "report/summary.json")]}
    content["arms"]["source"]["learning_rates"] = [0.02]
    return results, content


def test_only_the_new_seed_is_run(earlier):
    _, content = earlier
    design = opened(StudySettings.model_validate(content))
    new = {("scratch", 2), ("source", 2), ("stack", 2), ("source", 1)}  # seed 1 of the source was not measured
    assert {(job.trunk.arm, job.trunk.seed) for job in jobs(design) if job.measured is None} == new
    assert {(job.trunk.arm, job.trunk.seed) for job in jobs(design) if not is_done(job)} == new


def test_what_is_known_counts_as_before(earlier):
    before, content = earlier
    study = StudySettings.model_validate(content)
    after = collect(opened(study))
    assert after.of("stack") == before.of("stack") and after.of("scratch") == before.of("scratch")
    for budget in (10, 20):
        assert bands(after, "stack", budget) == bands(before, "stack", budget)
    assert early_losses(after, "stack", 20) == early_losses(before, "stack", 20) != {}
    for job in jobs(opened(study)):
        if job.measured and not is_done(job):
            scratch = job.trunk.arm == "scratch"
            write_result(job, 3.0 if scratch else 2.8, 50.0 * job.measured.budget, 0.0)
    assert bands(collect(opened(study)), "scratch", 20)["r_target"].seeds == 3


def test_a_summary_is_known_to_the_next_study_too(earlier, tmp_path):
    _, content = earlier
    results = collect(opened(StudySettings.model_validate(content)))
    again = write_study_report(results, tmp_path / "again", "command")
    first = json.loads((tmp_path / "report/summary.json").read_text())
    for name in ("branches", "arms"):
        assert again[name] == first[name], name


def test_a_trunk_that_a_new_branch_starts_from_is_run(earlier):
    _, content = earlier
    content["arms"]["stack"]["branches"] = [0.8, 1.0, 1.2]
    content["seeds"] = [0, 1]
    left = [job.name for job in jobs(opened(StudySettings.model_validate(content))) if not is_done(job)]
    assert [name.partition("/")[0] for name in left if "seed0" in name] == ["source", *["stack"] * 4]
    assert sum("stack" in name and "branch" in name for name in left) == 4


def test_another_study_is_refused(earlier):
    _, content = earlier
    content["decay"] = 0.3
    with pytest.raises(ConfigError, match=r"summary.json: it belongs to another study: decay is 0.2, expected 0.3"):
        opened(StudySettings.model_validate(content))


def test_a_model_of_another_size_is_refused(earlier, tmp_path):
    _, content = earlier
    path = tmp_path / "2.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 24}))
    with pytest.raises(ConfigError, match=r"summary.json: it belongs to another study: models is .*'ffn': 16"):
        opened(StudySettings.model_validate(content))
