"""The real engine through the real loop, in real processes: resuming, signals, and what a checkpoint holds."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from token_data import write_random_documents

from incr_ds.checkpoint.opening import open_source
from incr_ds.checkpoint.publish import verify_manifest
from incr_ds.launch.stopping import STOPPED
from incr_ds.testing.memory import drawn_model, small_architecture
from incr_ds.testing.processes import free_port
from incr_ds.train.evaluation import evaluate_checkpoint
from incr_ds.train.metrics import TIMINGS, read_metrics

ROOT = Path(__file__).parents[2]
LAUNCHER = ROOT / "launchers" / "pretrain.py"
LENGTH = 16
LAYOUTS = {
    "data": {"data_parallel": 2, "zero_stage": 1},
    "pipeline": {"pipeline_parallel": 2, "zero_stage": 1},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny model's config, data for it, and a smaller teacher."""
    folder = tmp_path_factory.mktemp("material")
    write_random_documents(folder, documents=30, length=50)
    (folder / "config.json").write_text(json.dumps(dict(small_architecture("llama", tie_word_embeddings=True).config)))
    teacher = drawn_model(small_architecture("llama", hidden_size=48, num_hidden_layers=2), torch.float32)
    teacher.save_pretrained(folder / "teacher")
    return folder


def write_run_file(material, folder, layout, **changes):
    content = {
        "output": str(folder / "run"),
        "seed": 5,
        "precision": "fp32",
        "model": {"config": str(material / "config.json")},
        "layout": LAYOUTS[layout],
        "batch": {"sequence_length": LENGTH, "micro_batch_size": 1, "global_batch_size": 4},
        "schedule": {"train_steps": 6, "learning_rate": 1e-2, "warmup_steps": 2},
        "data": {
            "train": [{"prefix": str(material / "x_train_text_document")}],
            "validation": {name: str(material / f"x_{name}_text_document") for name in ("validation", "train")},
        },
        "evaluation": {"interval": 3, "samples": 8},
        "checkpoint": {"interval": 3, "keep_last": 0},
        "distillation": {"teacher": str(material / "teacher"), "weight": 0.5, "anneal_steps": 5, "temperature": 1.5},
        "log_interval": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content | changes))
    return folder / "run.yaml"


def start_ranks(*command, num_ranks=2):
    """Start one process per rank, as srun does."""
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_ranks)}
    shared |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip


def finish(processes, timeout=200, code=0):
    try:
        shown = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(shown)
    return shown


def pretrain(run_file, output):
    return finish(start_ranks(LAUNCHER, "--config", run_file, "--set", f"output={output}"))


def curve(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in item.items() if key not in TIMINGS} for item in rows]


@pytest.mark.parametrize("layout", [pytest.param("data", marks=pytest.mark.slow), "pipeline"])
def test_three_steps_and_three_more_are_six_steps_bit_for_bit(material, tmp_path, layout):
    run_file = write_run_file(material, tmp_path, layout)
    pretrain(run_file, tmp_path / "whole")
    # The second run finds what a kill after step 3, in the middle of step 6, would have left.
    name = "checkpoints/step_00000003"
    shutil.copytree(tmp_path / "whole" / name, tmp_path / "parts" / name)
    shutil.copyfile(tmp_path / "whole" / "metrics.jsonl", tmp_path / "parts" / "metrics.jsonl")
    shown = pretrain(run_file, tmp_path / "parts")
    whole, parts = curve(tmp_path / "whole"), curve(tmp_path / "parts")
    assert [item["step"] for item in whole if item["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert parts == whole
    assert f"resumed from {tmp_path}/parts/checkpoints/step_00000003, step 3" in shown[0]
    assert f"report: {tmp_path}/parts/report.html" in shown[0] and "report:" not in shown[1]
    page = (tmp_path / "parts" / "report.html").read_text()
    assert "finished after step 6" in page and page.count("data:image/png;base64,") == 10  # MFU is not known here
    assert "finished" in shown[0] and "finished" not in shown[1]  # only the first rank prints

    final = [open_source(tmp_path / name / "checkpoints" / "step_00000006") for name in ("whole", "parts")]
    assert final[0].facts.step == 6 and final[0].facts.layout["data_parallel"] == LAYOUTS[layout].get(
        "data_parallel", 1
    )
    for spec in final[0].architecture.stored:
        for state in ("weight", "exp_avg", "exp_avg_sq"):
            first, second = (checkpoint.read(spec.name, state) for checkpoint in final)
            assert torch.equal(first, second), (spec.name, state)

    # What the run measured on held-out text is what transformers computes from the checkpoint.
    found = evaluate_checkpoint(final[0], str(material / "x_validation_text_document"), LENGTH, 8)
    assert found.loss == pytest.approx(whole[-1]["sets"]["validation"]["loss"], rel=1e-5)
    found = evaluate_checkpoint(final[0], str(material / "x_train_text_document"), LENGTH, 8)
    assert found.loss == pytest.approx(whole[-1]["sets"]["train"]["loss"], rel=1e-5)


def endless_run(material, tmp_path):
    return write_run_file(
        material, tmp_path, "data", schedule={"train_steps": 100000, "learning_rate": 1e-3},
        evaluation=None, distillation=None, checkpoint={"interval": 100000}, tensorboard=False,
    )  # fmt: skip


def wait_for_steps(folder, processes):
    metrics, deadline = folder / "metrics.jsonl", time.monotonic() + 150
    while not (metrics.exists() and metrics.read_text().count("\n") > 2) and time.monotonic() < deadline:
        assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
        time.sleep(0.1)


def saved_step(folder):
    """The step of the one checkpoint, which is that of the last row."""
    (saved,) = (folder / "checkpoints").iterdir()
    facts, last = verify_manifest(saved)["facts"], read_metrics(folder / "metrics.jsonl")[-1]
    assert facts["position"]["step"] == last["step"] and facts["position"]["consumed_samples"] == 4 * last["step"]
    return last["step"]


def test_a_signal_to_one_rank_saves_on_all_and_ends_with_the_code_of_a_stop(material, tmp_path):
    processes = start_ranks(LAUNCHER, "--config", endless_run(material, tmp_path))
    wait_for_steps(tmp_path / "run", processes)
    processes[1].send_signal(signal.SIGUSR1)
    shown = finish(processes, code=STOPPED)
    step = saved_step(tmp_path / "run")
    assert f"stopped by another rank's request after step {step} of 100000" in shown[0]


SLOW_ENDS = (pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))


@pytest.mark.parametrize("number", [signal.SIGKILL, *SLOW_ENDS])
def test_the_end_of_the_deepspeed_command_saves_and_leaves_no_process(material, tmp_path, number):
    run_file = endless_run(material, tmp_path)
    words = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", str(free_port())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "log", "w") as log:
        command = subprocess.Popen(
            [*map(str, words), LAUNCHER, "--config", run_file],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for_steps(tmp_path / "run", [])
        tree = psutil.Process(command.pid).children(recursive=True)
        assert len(tree) == 3  # the launcher and two ranks
        command.send_signal(number)
        command.wait(90)
        _, alive = psutil.wait_procs(tree, timeout=30)
        assert not alive
    finally:
        command.kill()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(run_file) in process.cmdline():
                    process.kill()
    step = saved_step(tmp_path / "run")
    shown = (tmp_path / "log").read_text()  # whichever rank noticed it first
    assert re.search(rf"stopped by (the end of the launcher|another rank's request) after step {step} of 100000", shown)


def test_a_user_mistake_ends_with_2_and_one_message(material, tmp_path):
    run_file = write_run_file(material, tmp_path, "data", data={"train": [{"prefix": str(tmp_path / "nowhere")}]})
    processes = start_ranks(LAUNCHER, "--config", run_file, "--set", "evaluation=null")
    shown = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert f"{tmp_path}/nowhere.bin: no such file" in shown[0] and "nowhere" not in shown[1]
    assert "Traceback" not in "".join(shown)
    assert not (tmp_path / "run" / "checkpoints").exists()
