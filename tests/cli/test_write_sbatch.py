"""write_sbatch: what a script asks of Slurm, the hostfile as the deepspeed launcher reads it, and what is refused."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from incr_ds.cli.write_sbatch import main
from incr_ds.config.layout import ParallelLayout
from incr_ds.errors import ConfigError
from incr_ds.launch.batch_script import BatchJob, batch_script, job_name, seconds
from incr_ds.launch.nodes import Nodes, divide
from incr_ds.testing.runs import pico_run

ROOT = Path(__file__).parents[2]
APP = typer.Typer()
APP.command()(main.__wrapped__)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like the repository's, with a run of 16 ranks: tensor 2 x pipeline 2 x data 4."""
    run = pico_run().model_dump(mode="json")
    run |= {"layout": {"tensor_parallel": 2, "pipeline_parallel": 2, "data_parallel": 4}}
    run["batch"]["global_batch_size"] = 8
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    (tmp_path / "launchers").mkdir()
    (tmp_path / "launchers" / "pretrain.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(*words):
    result = CliRunner().invoke(APP, ["run.yaml", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def asked(script):
    """The options of #SBATCH."""
    lines = re.findall(r"^#SBATCH --(\S+)$", script, re.M)
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_script_asks_for_the_layouts_ranks_and_is_valid_bash(folder):
    script = written()
    assert asked(script) == {
        "job-name": "run", "nodes": "2", "ntasks-per-node": "8", "gpus-per-node": "8", "cpus-per-task": "8",
        "time": "24:00:00", "signal": "USR1@300", "requeue": "", "open-mode": "append", "output": "%x-%j.log",
    }  # fmt: skip
    lines = script.splitlines()
    assert f"cd {folder}" in lines and 'set -- --config run.yaml "$@"' in lines
    assert f"source {sys.prefix}/bin/activate" in lines
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    # Slurm reads no option after the first command.
    assert all(line.startswith("#") for line in lines[: max(n for n, line in enumerate(lines) if "#SBATCH" in line)])


def test_options_appear_in_the_script(folder):
    script = written(
        *shlex.split(
            "--nodes 4 --gpus-per-node 4 --time 2-12 --partition gpu,big --account my-lab --job-name grown "
            "--signal-seconds 900 --cpus-per-task 14 --environment 'conda activate incr' --set 'output=a; touch x'"
        )
    )
    expected = {"nodes": "4", "ntasks-per-node": "4", "gpus-per-node": "4", "time": "2-12", "partition": "gpu,big"}
    expected |= {"account": "my-lab", "job-name": "grown", "signal": "USR1@900", "cpus-per-task": "14"}
    assert expected.items() <= asked(script).items()
    assert "conda activate incr\n" in script and "900 seconds must hold" in script
    assert "set -- --config run.yaml --set 'output=a; touch x' \"$@\"\n" in script


def test_a_file_appears_whole_and_is_replaced_only_when_asked(folder):
    assert "submit it with: sbatch job.sbatch" in written("--output", "job.sbatch")
    text = (folder / "job.sbatch").read_text()
    assert text == written()
    with pytest.raises(ConfigError, match="job.sbatch: exists already; choose another name, or add --overwrite"):
        written("--output", "job.sbatch", "--time", "60")
    assert (folder / "job.sbatch").read_text() == text
    written("--output", "job.sbatch", "--time", "60", "--overwrite")
    assert "--time=60\n" in (folder / "job.sbatch").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["job.sbatch", "launchers", "run.yaml"]


COMMAND = "deepspeed --hostfile hosts launchers/pretrain.py --config run.yaml --set seed=3"


def test_a_hostfile_has_the_hosts_and_the_command(folder):
    written("--hosts", "node1,node2.cluster", "--output", "hosts", "--set", "seed=3")
    lines = (folder / "hosts").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["node1 slots=8", "node2.cluster slots=8"]
    assert lines[2:4] == [f"#   cd {folder}", f"#   {COMMAND}"]


@pytest.mark.slow
def test_the_deepspeed_launcher_reads_the_hostfile_and_the_command(folder):
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    written("--hosts", "node1,node2.cluster", "--output", "hosts", "--set", "seed=3")
    assert dict(fetch_hostfile("hosts")) == {"node1": 8, "node2.cluster": 8}
    taken = parse_args(shlex.split(COMMAND)[1:])
    assert (taken.hostfile, taken.user_script) == ("hosts", "launchers/pretrain.py")
    assert taken.user_args == ["--config", "run.yaml", "--set", "seed=3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--set layout.data_parallel=three", "layout.data_parallel"),
        ("--set sed=3", "sed: unknown key; did you mean seed?"),
        ("--gpus-per-node 6", "has 16 ranks, which do not fill nodes of 6 GPUs; nearest that do: --gpus-per-node 4 or 8, or "),
        ("--gpus-per-node 6", r"layout.data_parallel 3 or 6 in the run file\."),
        ("--nodes 3", "16 ranks, which 3 nodes cannot share evenly; nearest that can: --nodes 2 or 4."),
        ("--nodes 3 --gpus-per-node 8", "24 GPUs, but the layout .* has 16 ranks, one per GPU; expected --nodes 2"),
        ("--time soon", "--time 'soon': expected minutes, minutes:seconds"),
        ("--time 5", "--signal-seconds 300: expected at least 1, at most 65535, and less than the 300 seconds of --time 5"),
        ("--signal-seconds 0", "--signal-seconds 0: expected at least 1"),
        ("--cpus-per-task 0", "--cpus-per-task 0: expected at least 1"),
        ("--partition 'gpu --wrap=x'", "--partition 'gpu --wrap=x': expected letters, digits"),
        ("--job-name 'a\ntouch x'", r"--job-name 'a\\ntouch x': expected letters"),
        ("--set 'seed=1\n'", r"'seed=1\\n': expected a value without line breaks"),
        ("--environment 'a\nb'", r"'a\\nb': expected a value without line breaks"),
        ("--environment 'if \"'", "not a valid line of bash: .*unexpected EOF"),
        ("--overwrite", "--overwrite: without effect; add --output"),
        ("--output launchers", "launchers: a folder; name a file in it"),
        ("--output nowhere/job", "nowhere/job: the folder nowhere does not exist"),
        ("--hosts a,b --time 5", "--time: without effect with --hosts"),
        ("--hosts a,b --job-name x", "--job-name: without effect with --hosts"),
        ("--hosts a", "--hosts: 1 host, but the run needs 2 nodes x 8 GPUs = 16 ranks; name 2 hosts, or state --gpus-per-node"),
        ("--hosts a,a", "--hosts a: named twice"),
        ("--hosts a,", "--hosts '': expected host names, separated by commas"),
        ("--hosts a,b --output 'my hosts'", "'my hosts': the deepspeed launcher gives it unquoted"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_wrong_and_write_nothing(folder, words, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        written(*shlex.split(words))
    assert sorted(folder.rglob("*")) == before


def test_without_the_launcher_there_is_nothing_to_start(folder):
    (folder / "launchers" / "pretrain.py").unlink()
    with pytest.raises(
        ConfigError, match=r"launchers/pretrain.py: not in .*; run this in the folder of the repository"
    ):
        written()


@pytest.mark.parametrize(
    ("ranks", "nodes", "gpus", "expected"),
    [
        (1, None, None, Nodes(1, 1)),
        (6, None, None, Nodes(1, 6)),
        (32, None, None, Nodes(4, 8)),
        (12, None, 4, Nodes(3, 4)),
        (12, 2, None, Nodes(2, 6)),
        (12, 3, 4, Nodes(3, 4)),
    ],
)
def test_nodes_by_hand(ranks, nodes, gpus, expected):
    assert divide(ParallelLayout(data_parallel=ranks), nodes, gpus) == expected


def test_eight_gpus_are_a_default_that_may_not_divide():
    with pytest.raises(
        ConfigError, match="12 ranks, which do not fill nodes of 8 GPUs; .* 6, or layout.data_parallel 2 or 4"
    ):
        divide(ParallelLayout(tensor_parallel=2, pipeline_parallel=2, data_parallel=3))


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 5400), ("1:30", 90), ("2:00:05", 7205), ("1-2", 93600), ("1-0:30", 88200), ("1-0:0:9", 86409)],
)
def test_slurms_time_formats(time, expected):
    """As the man page of sbatch lists them."""
    assert seconds(time) == expected


@pytest.mark.parametrize(
    ("path", "expected"), [("a/llama-1b.yaml", "llama-1b"), ("my run$(x).yaml", "my_run__x_"), ("--.yaml", "pretrain")]
)
def test_job_names_follow_the_run_file(path, expected):
    assert job_name(Path(path)) == expected
    BatchJob(Nodes(1, 1), expected)


def test_a_folder_with_a_line_break_is_refused():
    with pytest.raises(ConfigError, match="expected a value without line breaks"):
        batch_script(BatchJob(Nodes(1, 1), "x"), [], Path("/a\nb"), "true")


def test_the_command_prints_one_message_and_exits_with_2(folder):
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "write_sbatch.py", "none.yaml"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: none.yaml: cannot be read") and "Traceback" not in done.stderr
