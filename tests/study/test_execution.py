"""A tiny study trained for real: stopped by its time limit, killed, and finished by the same command."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import psutil
import pytest
import yaml
from studies import tiny_study

from incr_ds.checkpoint.publish import read_manifest
from incr_ds.config.fields import load_settings
from incr_ds.config.study import StudySettings
from incr_ds.errors import CheckpointError, ConfigError
from incr_ds.study.design import jobs
from incr_ds.study.execution import _has_ended, assumed, check_study, is_done, opened, result_of

TOOL = Path(__file__).parents[2] / "tools" / "growth_study.py"


def write_data(folder: Path) -> None:
    """Two data sets of a few words that repeat, so that a tiny model learns something."""
    import numpy as np
    from token_data import write_documents

    for name, seed in (("train", 1), ("code", 2)):
        generator = np.random.default_rng(seed)
        drawn = [(np.cumsum(generator.integers(1, 3, 400)) % 31 + 1).tolist() for _ in range(40)]
        write_documents(folder / name, drawn)


def study_file(folder: Path) -> Path:
    write_data(folder)
    content = tiny_study(folder).model_dump(mode="json", exclude_unset=True)
    content |= {
        "seeds": [0],
        "tokens_per_parameter": [2],
        "held_out": {"code": str(folder / "code")},
        "held_out_samples": 8,
    }
    content["common"] |= {
        "batch": {"sequence_length": 72, "micro_batch_size": 4, "global_batch_size": 4},
        "data": {"train": [{"prefix": str(folder / "train")}]},
        "checkpoint": {"interval": 4, "keep_last": 1},
        "log_interval": 1,
        "tensorboard": False,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(content))
    return folder / "study.yaml"


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=600, env=environment()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def test_a_study_without_its_data_is_refused_before_it_writes(tmp_path):
    with pytest.raises(ConfigError, match="data/train.bin: no such file"):
        check_study(tiny_study(tmp_path))
    path = study_file(tmp_path)
    study = load_settings(path, StudySettings)
    check_study(study)
    (tmp_path / "code.idx").unlink()
    with pytest.raises(ConfigError, match="code.idx"):
        check_study(study)
    wrong = study.model_copy(update={"common": {**study.common, "precison": "fp32"}})
    with pytest.raises(
        ConfigError, match=r"(?s)the study's run scratch.*precison: unknown key; did you mean precision"
    ):
        check_study(wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_goes_on_after_a_kill_and_reports(tmp_path):
    path = study_file(tmp_path)
    planned = run_tool("--config", str(path), "--plan")
    assert planned.returncode == 0 and "9 runs" in planned.stdout, planned.stdout + planned.stderr
    killed = subprocess.Popen(
        [sys.executable, str(TOOL), "--config", str(path)],
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    until = time.monotonic() + 300
    while not list((tmp_path / "out").glob("*/*/trunk/checkpoints/step_*")) and time.monotonic() < until:
        time.sleep(0.2)
    workers = psutil.Process(killed.pid).children(recursive=True)
    assert len(workers) >= 2
    killed.kill()
    killed.wait()
    _, alive = psutil.wait_procs(workers, timeout=120)
    for worker in alive:
        worker.kill()
    assert not alive, "runs go on without their study"
    study = load_settings(path, StudySettings)
    assert not all(is_done(job) for job in jobs(opened(study)))
    short = run_tool("--config", str(path), "--for", "1s")
    assert short.returncode == 0 and "the same command goes on" in short.stdout, short.stdout + short.stderr
    probed = run_tool("--config", str(path), "--probe", "5", "--json")
    assert probed.returncode == 0, probed.stderr
    ranking = json.loads(probed.stdout)["ranking"]
    assert [item["arm"] for item in ranking] == ["stack"] and 0 < ranking[0]["loss"] < 4.0
    done = run_tool("--config", str(path), "--report", str(tmp_path / "report"), "--json")
    assert done.returncode == 0, done.stderr
    check_costs(study)
    content = json.loads((tmp_path / "report/summary.json").read_text())
    assert content["best_arm"] in (None, "stack") and set(content["arms"]) == {"scratch", "source", "stack"}
    assert json.loads(done.stdout)["arms"]["stack"]["parameters"] == content["target_parameters"]


def check_costs(study: StudySettings) -> None:
    """Every branch's cost is the sum of the runs before it, each by its own model, and its source's is named apart."""
    per_token = {layers: 6 * (256 + layers * 640) + 12 * layers * 8 * 72 for layers in (2, 4)}
    for job in jobs(opened(study)):
        if job.measured is None:
            continue
        result = result_of(job)
        assert 0 < result["loss"] < 4.0 and 0 <= result["cloze"] <= 1 and abs(result["repetition_gain"]) < 0.5
        tokens = 4 * 72
        of_source = job.trunk.first * tokens * per_token[2]
        small = job.trunk.arm == "source"
        own = (job.measured.position - job.trunk.first) * tokens * per_token[2 if small else 4]
        assert result["source_flops"] == of_source and result["flops"] == of_source + own
        assert read_manifest(job.final)["facts"]["position"]["step"] == job.steps


def test_a_killed_process_is_an_error_of_one_line(tmp_path):
    job = jobs(assumed(tiny_study(tmp_path)))[0]
    killed: Future[bool] = Future()
    killed.set_exception(BrokenProcessPool("a child process terminated abruptly"))
    with pytest.raises(
        CheckpointError, match=r"/trunk: a process of the study was killed while this run trained, perhaps"
    ):
        _has_ended(killed, job)
