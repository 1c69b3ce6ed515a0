"""launchers/slurm/pretrain.sbatch with stand-ins for Slurm's commands and for the training program, signals included."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launchers" / "slurm" / "pretrain.sbatch"
# Saves step 1, then runs until it is asked to stop, saves step 2 and ends as a stopped run does.
PROGRAM = """
import os, signal, sys, time, yaml
run = yaml.safe_load(open(sys.argv[sys.argv.index("--config") + 1]))
if "--print-config" in sys.argv:
    if run.get("wrong"):
        sys.exit("pretrain: wrong: unknown key")
    print(yaml.safe_dump(run), end="")
    sys.exit(0)
def save(step):
    os.makedirs(os.path.join(run["output"], "checkpoints", f"step_{step:08d}"), exist_ok=True)
def stop(number, frame):
    if run.get("saves", True):
        save(2)
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
if "ends" in run:
    if run.get("saves", True):
        save(run["schedule"]["train_steps"] if run["ends"] == 0 else 1)
    sys.exit(run["ends"])
print("training", os.environ["RANK"], os.environ["WORLD_SIZE"], flush=True)
while True:
    time.sleep(0.05)
"""
STAND_INS = {
    # As srun does, it passes SIGUSR1 on to its tasks and waits for them.
    "srun": """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
trap 'kill -USR1 $task' USR1
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & task=$!
while status=0; wait $task || status=$?; kill -0 $task 2>/dev/null; do :; done
wait $task
""",
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then echo node1; else echo "$@" >> requeued; fi
""",
}


@pytest.fixture
def cluster(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "launchers").mkdir()
    (tmp_path / "launchers" / "pretrain.py").write_text(PROGRAM)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f'PATH="{tmp_path}/bin:{Path(sys.executable).parent}:$PATH"\n')
    return tmp_path


@contextmanager
def job(cluster, run_file):
    (cluster / "run.yaml").write_text('schedule: {train_steps: 2}\noutput: "2026"\n' + run_file)
    slurm = {"SLURM_SUBMIT_DIR": cluster, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_JOB_NODELIST": "node1"}
    words = ["bash", SCRIPT, "run.yaml"]
    with subprocess.Popen(
        words, env=os.environ | slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cluster
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def ended(process):
    shown = process.communicate(timeout=60)[0]
    return process.returncode, shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_batch_script_saves_and_queues_the_job_again(cluster, number):
    with job(cluster, "") as process:
        assert process.stdout.readline() == "training 0 1\n"
        process.send_signal(number)
        code, shown = ended(process)
    assert code == 0, shown
    assert f"received {number.name.removeprefix('SIG')}: the ranks save and end" in shown
    assert "got from the start to step_00000002 (exit 75); queued again" in shown
    assert (cluster / "requeued").read_text() == "requeue 7\n"
    assert (cluster / "2026" / "checkpoints" / "step_00000002").is_dir()  # an output that YAML could take for a number


def test_a_finished_run_is_not_queued_again(cluster):
    with job(cluster, "ends: 0") as process:
        code, shown = ended(process)
    assert (code, shown) == (0, "finished: 2026/checkpoints/step_00000002\n")
    assert not (cluster / "requeued").exists()


@pytest.mark.parametrize(
    ("run_file", "expected", "message"),
    [
        ("ends: 2", 2, "has to be changed first; its message is above. Not queued again"),
        ("wrong: true", 2, "pretrain: wrong: unknown key\nthe run file is not valid; its message is above"),
        ("ends: 1\nsaves: false", 1, "no step was saved since the start (exit 1); not queued again"),
    ],
)
def test_a_run_that_would_fail_again_is_not_queued_again(cluster, run_file, expected, message: str):
    with job(cluster, run_file) as process:
        code, shown = ended(process)
    assert code == expected and message in shown
    assert not (cluster / "requeued").exists()


def test_a_crash_after_progress_queues_the_job_again_and_copies_do_not_count(cluster):
    (cluster / "2026" / "checkpoints" / "step_00000009.bak").mkdir(parents=True)
    with job(cluster, "ends: 134") as process:
        code, shown = ended(process)
    assert code == 0 and "got from the start to step_00000001 (exit 134); queued again" in shown
    assert (cluster / "requeued").exists()


def test_a_stop_without_progress_is_not_queued_for_ever(cluster):
    with job(cluster, "saves: false") as process:
        assert process.stdout.readline() == "training 0 1\n"
        process.send_signal(signal.SIGTERM)
        code, shown = ended(process)
    assert code == 75 and "no step was saved since the start (exit 75); not queued again" in shown
