"""The batch scripts, hand-written and generated, with stand-ins for Slurm's commands and for the training program."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from incr_ds.launch.batch_script import BODY, BatchJob, batch_script, directives, launch_words
from incr_ds.launch.nodes import Nodes

GENERIC = Path(__file__).parents[2] / "launchers" / "slurm" / "pretrain.sbatch"
RUN_FILE = "it's $(touch injected) a `touch injected` run.yaml"
JOB = BatchJob(Nodes(2, 1), "test")
# Saves step 1, then runs until it is asked to stop, saves step 2 and ends as a stopped run does.
PROGRAM = """
import json, os, signal, sys, time, yaml
FACTS = "RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS SRUN_CPUS_PER_TASK NCCL_DEBUG".split()
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
seen = {name: os.environ.get(name) for name in FACTS} | {"arguments": sys.argv[1:]}
with open(f"rank{os.environ['RANK']}.json", "w") as stream:
    json.dump(seen, stream)
os.write(1, f"training {os.environ['RANK']} {os.environ['WORLD_SIZE']}\\n".encode())  # at once, whole
while True:
    time.sleep(0.05)
"""
STAND_INS = {
    # As srun does, it passes SIGUSR1 on to its tasks, waits for them, and ends with the highest of their exit codes.
    "srun": """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
tasks=()
trap 'kill -USR1 "${tasks[@]}"' USR1
for ((number = 0; number < SLURM_NTASKS; number++)); do
  SLURM_PROCID=$number SLURM_LOCALID=$((number % SLURM_NTASKS_PER_NODE)) "$@" & tasks+=($!)
done
worst=0
for task in "${tasks[@]}"; do
  while wait $task; kill -0 $task 2>/dev/null; do :; done
  wait $task && status=0 || status=$?
  worst=$((status > worst ? status : worst))
done
exit $worst
""",
    "scontrol": """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node1\nnode2\n'; elif [ -e refuses ]; then exit 1; else echo "$@" >> requeued; fi
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


@pytest.fixture
def words(request, cluster):
    """The command that starts the batch script on RUN_FILE: a generated one, or as a test asks."""
    if getattr(request, "param", "generated") == "hand-written":
        return ["bash", GENERIC, RUN_FILE]
    text = batch_script(JOB, launch_words([Path(RUN_FILE)], []), cluster, "source .venv/bin/activate")
    (cluster / "job.sbatch").write_text(text)
    return ["bash", cluster / "job.sbatch"]


BOTH = pytest.mark.parametrize("words", ["hand-written", "generated"], indirect=True)


@contextmanager
def job(cluster, words, run_file):
    (cluster / RUN_FILE).write_text('schedule: {train_steps: 2}\noutput: "2026"\n' + run_file)
    slurm = {"SLURM_SUBMIT_DIR": cluster, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "3"}
    with subprocess.Popen(
        words, env=os.environ | slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cluster
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_ranks(process):
    assert sorted(process.stdout.readline() for _ in range(2)) == ["training 0 2\n", "training 1 2\n"]


def ended(process):
    shown = process.communicate(timeout=60)[0]
    return process.returncode, shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_batch_script_saves_and_queues_the_job_again(cluster, words, number):
    with job(cluster, words, "") as process:
        wait_for_ranks(process)
        process.send_signal(number)
        code, shown = ended(process)
    assert code == 0, shown
    assert f"received {number.name.removeprefix('SIG')}: the ranks save and end" in shown
    assert "got from the start to step_00000002 (exit 75); queued again" in shown
    assert (cluster / "requeued").read_text() == "requeue 7\n"
    assert (cluster / "2026" / "checkpoints" / "step_00000002").is_dir()  # an output that YAML could take for a number


@BOTH
def test_a_finished_run_is_not_queued_again(cluster, words):
    with job(cluster, words, "ends: 0") as process:
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
def test_a_run_that_would_fail_again_is_not_queued_again(cluster, words, run_file, expected, message: str):
    with job(cluster, words, run_file) as process:
        code, shown = ended(process)
    assert code == expected and message in shown
    assert not (cluster / "requeued").exists()


def test_a_crash_after_progress_queues_the_job_again_and_copies_do_not_count(cluster, words):
    (cluster / "2026" / "checkpoints" / "step_00000009.bak").mkdir(parents=True)
    with job(cluster, words, "ends: 134") as process:
        code, shown = ended(process)
    assert code == 0 and "got from the start to step_00000001 (exit 134); queued again" in shown
    assert (cluster / "requeued").exists()


@BOTH
def test_a_stop_without_progress_is_not_queued_for_ever(cluster, words):
    with job(cluster, words, "saves: false") as process:
        wait_for_ranks(process)
        process.send_signal(signal.SIGTERM)
        code, shown = ended(process)
    assert code == 75 and "no step was saved since the start (exit 75); not queued again" in shown
    assert not (cluster / "requeued").exists()


def test_a_job_that_gets_no_further_after_it_was_queued_again_stops(cluster, words):
    for run_file, expected in (("", 0), ("saves: false", 75)):
        with job(cluster, words, run_file) as process:
            wait_for_ranks(process)
            process.send_signal(signal.SIGUSR1)
            code, shown = ended(process)
        assert code == expected, shown
    assert "no step was saved since step_00000002 (exit 75); not queued again" in shown
    assert (cluster / "requeued").read_text() == "requeue 7\n"


def test_a_requeue_that_slurm_refuses_is_reported(cluster, words):
    (cluster / "refuses").touch()
    with job(cluster, words, "ends: 134") as process:
        code, shown = ended(process)
    assert code == 75 and "Slurm did not queue the job again; submit it by hand, and it continues from step_" in shown


@BOTH
def test_ranks_get_their_environment_and_arguments_and_no_name_is_run_as_a_command(cluster, words):
    with job(cluster, [*words, "--set", "seed=2; touch injected"], "") as process:
        wait_for_ranks(process)
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0
    for rank in (0, 1):
        assert json.loads((cluster / f"rank{rank}.json").read_text()) == {
            "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "20007",
            "OMP_NUM_THREADS": "3", "SRUN_CPUS_PER_TASK": "3", "NCCL_DEBUG": "WARN",
            "arguments": ["--config", RUN_FILE, "--set", "seed=2; touch injected"],
        }  # fmt: skip
    assert not (cluster / "injected").exists()


def test_the_hand_written_script_is_what_would_be_generated():
    """It has the same body, and asks Slurm for the same as a generated one for 8 ranks."""
    text = GENERIC.read_text()
    assert text.endswith(f"\n\n{BODY.read_text()}")
    asked = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert asked == directives(BatchJob(Nodes(1, 8), "incr_ds-pretrain"))


def test_the_page_on_several_nodes_says_what_script_and_launcher_do():
    page = (GENERIC.parents[2] / "docs" / "several_nodes.md").read_text()
    assert (
        "MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))" in BODY.read_text() and "20000 + job number mod 20000" in page
    )
    deepspeed = Path(importlib.util.find_spec("deepspeed").origin).parent
    exported = re.search(r"^EXPORT_ENVS = \[(.*)\]", (deepspeed / "launcher" / "runner.py").read_text(), re.M)[1]
    stated = re.search(r"variables that begin\nwith (.*)\. Others", page)[1]
    assert set(re.findall(r"`(\w+)`", stated)) == {*re.findall(r"'(\w+)'", exported), "NCCL"} - {"MLFLOW"}
    assert "timeout=30)" in (deepspeed / "launcher" / "launch.py").read_text() and "They have 30 seconds" in page
    waits = re.search(r'"DEEPSPEED_TIMEOUT", default=(\d+)', (deepspeed / "constants.py").read_text())[1]
    assert f"{waits} by default" in page
