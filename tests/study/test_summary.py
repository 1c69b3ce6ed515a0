"""A study's numbers and report from results that are written by hand."""

import json
from pathlib import Path

import pytest
from studies import TARGET, tiny_study

from incr_ds.config.study import StudySettings
from incr_ds.errors import CheckpointError
from incr_ds.study.design import StudyJob, jobs
from incr_ds.study.execution import best_rate, execute, is_done, opened
from incr_ds.study.pages import table, write_study_report
from incr_ds.study.summary import Results, best_arm, collect, spearman, summary


def write_result(job: StudyJob, loss: float, flops: float, source: float) -> None:
    """What a worker writes after a branch, and the metrics of the trunk that it left."""
    folder = Path(job.run["output"])
    folder.mkdir(parents=True, exist_ok=True)
    measures = {"losses": {"code": loss}, "bits_per_byte": {"code": None}, "cloze": 0.5, "repetition_gain": 0.75}
    costs = {"flops": flops, "source_flops": source, "seconds": flops / 100, "source_seconds": source / 100}
    content = {"loss": loss, **measures, "layer_distance": 1.5, "effective_rank": 0.25, **costs}
    (folder / "result.json").write_text(json.dumps(content))
    trunk = job.start.parents[1]
    trunk.mkdir(parents=True, exist_ok=True)
    rows = [
        {"kind": "train", "step": s, "tokens": 64 * s, "flops": 1.0, "loss": 3.0, "ce": 4.0 - s / 1000, "seconds": 1.0}
        for s in range(1, 800)
    ]
    rows += [
        {"kind": "evaluation", "step": s, "tokens": 64 * s, "flops": 1.0, "loss": 4.0 - s / 1000} for s in (100, 200)
    ]
    (trunk / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_results(study: StudySettings) -> Results:
    """Scratch reaches 3.0 for 1000 at budget 20, and 3.5 for 500 at 10; the stack 3.0 at 200 + 600 of the source and its own."""
    for job in jobs(opened(study)):
        if job.measured and job.trunk.arm == "source":
            better = job.trunk.rate == 0.02
            write_result(job, 3.4 if better else 3.6, 400.0 * job.measured.budget / 20, 0.0)
    for job in jobs(opened(study)):
        if job.measured is None or job.trunk.arm == "source":
            continue
        trunk, budget = job.trunk, job.measured.budget
        seed = 0.02 * trunk.seed
        if trunk.arm == "scratch":
            write_result(job, (3.0 if budget == 20 else 3.5) + seed, 50.0 * budget, 0.0)
        else:
            early = job.measured.fraction < 1
            write_result(job, (3.1 if early else 2.9) + seed, (640.0 if early else 1000.0) * budget / 20, 10.0 * budget)
    return collect(opened(study))


def test_an_arm_of_fewer_seeds_is_not_the_best(tmp_path):
    content = tiny_study(tmp_path).model_dump(mode="json", exclude_unset=True)
    stack = content["arms"].pop("stack")
    content["arms"] |= {"lucky": stack | {"seeds": [0]}, "stack": stack}
    results = write_results(StudySettings.model_validate(content))
    assert best_arm(results) == "stack"
    assert summary(results)["arms"]["lucky"]["r_target"]["20"]["seeds"] == 1


def test_an_arm_that_never_reaches_the_loss_is_named_with_a_bound(tmp_path):
    study = tiny_study(tmp_path)
    for job, result in write_results(study).measured:
        if job.trunk.arm == "stack":
            Path(job.run["output"], "result.json").write_text(json.dumps(result | {"loss": 3.6}))
    content = summary(collect(opened(study)))
    assert content["best_arm"] == "stack" and content["r_target"]["20"]["bound"] == "above"
    assert content["r_target"]["20"]["value"] == pytest.approx(1.0)  # its last branch cost what scratch did


def test_a_study_names_its_best_arm_and_its_ratios(tmp_path):
    study = tiny_study(tmp_path)
    results = write_results(study)
    assert best_rate(results.design, "source") == 0.02
    content = summary(results)
    assert content["target_parameters"] == TARGET and content["best_arm"] == "stack" and content["seeds"] == [0, 1]
    # Budget 20: scratch's 3.0 is halfway between the stack's 3.1 (640) and 2.9 (1000): 800 of scratch's 1000, 200 of them sunk.
    expected = {
        "value": pytest.approx(0.8),
        "low": pytest.approx(0.8),
        "high": pytest.approx(0.8),
        "seeds": 2,
        "bound": None,
    }
    assert content["r_target"]["20"] == expected
    assert content["r_sunk"]["20"]["value"] == pytest.approx(0.6)
    # Budget 10: its first branch, 320 of scratch's 500, is already below 3.5.
    assert content["r_target"]["10"]["value"] == pytest.approx(0.64) and content["r_target"]["10"]["bound"] == "below"
    assert content["arms"]["stack"]["r_target_seconds"]["20"]["value"] == pytest.approx(0.8)
    # The other rate's two branches; its trunk's checkpoint does not exist here.
    lost = sum(
        job.flops for job in jobs(results.design) if job.measured and job.name.startswith("source/seed0-lr0.01/")
    )
    assert content["learning_rate_search"] == {"flops": lost, "losses": {"source": {"0.01": 3.6, "0.02": 3.4}}}


def test_losses_after_growth_are_read_from_the_trunks(tmp_path):
    after = summary(write_results(tiny_study(tmp_path)))["arms"]["stack"]["after_growth"]
    # Step 451 of the source, and the mean of 8 steps up to it; the loss of the grown trunk falls by 0.001 a step.
    assert after["before"] == pytest.approx(4.0 - 0.4475)
    assert after["1"] == pytest.approx(3.999) and after["16"] == pytest.approx(4.0 - 0.0125)
    assert after["spike"] == pytest.approx(3.999)


def test_a_study_that_is_not_complete_claims_nothing(tmp_path):
    study = tiny_study(tmp_path)
    assert write_study_report(collect(opened(study)), tmp_path / "report", "")["best_arm"] is None
    results = write_results(study)
    gone = next(job for job, _ in results.measured if job.name == "stack/seed1-lr0.01-budget20/branch-902")
    (Path(gone.run["output"]) / "result.json").unlink()
    assert summary(collect(opened(study)))["r_target"]["20"]["seeds"] == 1


def test_a_rate_that_diverged_loses(tmp_path):
    study = tiny_study(tmp_path)
    trunk = next(job for job in jobs(opened(study)) if job.name == "source/seed0-lr0.02/trunk")
    Path(trunk.run["output"]).mkdir(parents=True)
    (Path(trunk.run["output"]) / "result.json").write_text(json.dumps({"diverged": "step 9: the loss is nan"}))
    branches = [job for job in jobs(opened(study)) if job.name.startswith("source/seed0")]
    assert [is_done(job) for job in branches] == [False, False, False, True, True, True]
    for job in branches[1:3]:
        write_result(job, 3.6, 100.0, 0.0)
    assert best_rate(opened(study), "source") == 0.01


def test_a_checkpoint_that_no_run_writes_any_more_is_refused(tmp_path):
    study = tiny_study(tmp_path)
    write_results(study)
    for job in jobs(opened(study)):
        if job.measured and not is_done(job):
            write_result(job, 3.4, 400.0, 0.0)
        if job.measured is None:  # every trunk is at its end, without the checkpoints that were kept before
            job.final.mkdir(parents=True)
            (job.final / "manifest.json").write_text("{}")
    gone = next(job for job in jobs(opened(study)) if job.name == "stack/seed1-lr0.01-budget20/branch-722")
    (Path(gone.run["output"]) / "result.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"step_00000127: missing, but stack.*past that step.*Remove .*trunk to train"
    ):
        execute(study, None, lambda progress: None)


def test_the_report_is_one_file_with_figures_and_bounds(tmp_path):
    study = tiny_study(tmp_path)
    content = write_study_report(
        write_results(study), tmp_path / "report", "python tools/growth_study.py --config a&b.yaml"
    )
    head, *rows = table(content)
    assert head[4:7] == ["R_target(10)", "R_sunk(10)", "R_frontier(10)"]
    stack = next(row for row in rows if row[0] == "stack")
    assert (
        stack[4] == "< 0.64 (0.64 to 0.64)"
        and stack[7] == "0.80 (0.80 to 0.80)"
        and stack[-3:] == ["2.9000", "0.500", "0.75"]
    )
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "summary.json", "table.md", "report.html", "loss_over_flops.png", "ratios.png", "curves.png",
    }  # fmt: skip
    page = (tmp_path / "report/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "://" not in page and "a&amp;b.yaml" in page
    assert json.loads((tmp_path / "report/summary.json").read_text())["versions"]["torch"]


def test_ranks_agree_or_are_opposite():
    assert spearman([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == 1.0
    assert spearman([1.0, 2.0, 3.0], [30.0, 20.0, 10.0]) == -1.0
