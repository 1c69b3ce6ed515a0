"""Writes the batch script of a run for Slurm: what is asked of Slurm, this run's command, and the body that all share."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from incr_ds.errors import ConfigError
from incr_ds.launch.nodes import Nodes

BODY = Path(__file__).with_name("pretrain_body.sh")
PROGRAM = Path("launchers/pretrain.py")
LATEST_SIGNAL = 65535  # seconds before the limit: Slurm's own bound
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<rest>\d+(?::\d+){0,2})")
# In a line of #SBATCH, spaces, quotes and # have a meaning of their own.
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,+@=-]*")


@dataclass(frozen=True)
class BatchJob:
    """What a job asks of Slurm. Raises ConfigError for values that Slurm would refuse, or read as something else.

    ``time`` is in Slurm's format. USR1 comes ``signal_seconds`` before its end, or up to a minute earlier.
    """

    nodes: Nodes
    name: str
    time: str = "24:00:00"
    signal_seconds: int = 300
    cpus_per_task: int = 8
    partition: str | None = None
    account: str | None = None

    def __post_init__(self) -> None:
        for option, value in (
            ("--job-name", self.name),
            ("--partition", self.partition),
            ("--account", self.account),
        ):
            if value is not None and not _WORD.fullmatch(value):
                raise ConfigError(
                    f"{option} {value!r}: expected letters, digits and _ . , + @ = - without spaces, as Slurm's names are."
                )
        if self.cpus_per_task < 1:
            raise ConfigError(f"--cpus-per-task {self.cpus_per_task}: expected at least 1.")
        limit = seconds(self.time)
        if not 1 <= self.signal_seconds <= min(limit - 1, LATEST_SIGNAL):
            raise ConfigError(
                f"--signal-seconds {self.signal_seconds}: expected at least 1, at most {LATEST_SIGNAL}, and less than the "
                f"{limit} seconds of --time {self.time}; it has to hold one step, one evaluation and one save."
            )


def seconds(time: str) -> int:
    """A time limit of Slurm in seconds. Raises ConfigError unless it is M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    found = _TIME.fullmatch(time)
    if found is None:
        raise ConfigError(
            f"--time {time!r}: expected minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or "
            "days-hours:minutes:seconds, like 24:00:00 or 2-12."
        )
    parts = [int(part) for part in found["rest"].split(":")]
    if found["days"] is None and len(parts) < 3:
        parts = [0, *parts]
    hours, minutes, rest = [*parts, 0, 0][:3]
    return ((int(found["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def job_name(run_file: Path) -> str:
    """A job's name for a run file: the file's, with _ for what Slurm's names do not have."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", run_file.stem).lstrip(".-") or "pretrain"


def directives(job: BatchJob) -> list[str]:
    """The lines of #SBATCH."""
    asked = [f"job-name={job.name}", f"nodes={job.nodes.count}", f"ntasks-per-node={job.nodes.gpus}"]
    asked += [f"gpus-per-node={job.nodes.gpus}", f"cpus-per-task={job.cpus_per_task}", f"time={job.time}"]
    asked += [f"{name}={value}" for name, value in (("partition", job.partition), ("account", job.account)) if value]
    asked += [f"signal=USR1@{job.signal_seconds}", "requeue", "open-mode=append", "output=%x-%j.log"]
    return [f"#SBATCH --{line}" for line in asked]


def launch_words(run_files: Sequence[Path], overrides: Sequence[str]) -> list[str]:
    """The arguments of launchers/pretrain.py."""
    return [word for path in run_files for word in ("--config", str(path))] + [
        word for override in overrides for word in ("--set", override)
    ]


def batch_script(job: BatchJob, words: Sequence[str], folder: Path, environment: str) -> str:
    """The script that starts ``launchers/pretrain.py WORDS`` in ``folder`` after the shell line ``environment``.

    Raises ConfigError if a word has control characters, or if ``environment`` is not one valid line of bash.
    """
    for word in (*words, str(folder), environment):
        _check_printable(word)
    _check_syntax(environment)
    lines = [
        "#!/usr/bin/env bash",
        f"# Pre-train on Slurm, one task per GPU: {job.nodes}. Written by tools/write_sbatch.py; docs/slurm.md explains it.",
        "#   sbatch THIS_FILE [--set key.path=value ...]",
        "# Submitted again, it continues from the run's newest complete checkpoint.",
        *directives(job),
        "# Without B:, the signal goes to srun's tasks directly. A signal to this script is passed on to them. Every rank saves",
        f"# after the same step and ends with 75. {job.signal_seconds} seconds must hold one step, one evaluation and one save.",
        "",
        "set -euo pipefail",
        f"cd {shlex.quote(str(folder))}",
        f'set -- {shlex.join(words)} "$@"',
        "# What activates an environment may use unset variables.",
        "set +u",
        environment,
        "set -u",
        "",
    ]
    return "\n".join(lines) + "\n" + BODY.read_text()


def launch_file(hosts: str, words: Sequence[str], folder: Path, name: str, nodes: Nodes) -> str:
    """A hostfile ``hosts`` for the deepspeed launcher. Its comments say how to start the run with it, saved as ``name``.

    Raises ConfigError if a shell would change a word, because that launcher gives them to the other nodes' shells unquoted.
    """
    command = ["deepspeed", "--hostfile", name, str(PROGRAM), *words]
    for word in (*command, str(folder)):
        _check_printable(word)
        if nodes.count > 1 and shlex.quote(word) != word:
            raise ConfigError(
                f"--hosts with {word!r}: the deepspeed launcher gives it unquoted to the shells of the other nodes; expected a "
                "name without spaces, quotes, brackets and such. Rename it, or state it in the run file."
            )
    return (
        f"# Hostfile of the deepspeed launcher: {nodes}. Start the run on the first host, with the\n"
        "# environment active. It reaches the others by ssh without a password, and they have the same paths:\n"
        f"#   cd {shlex.quote(str(folder))}\n"
        f"#   {shlex.join(command)}\n"
        f"{hosts}"
    )


def _check_printable(word: str) -> None:
    """Raise ConfigError for line breaks and control characters, which would end a line of the script."""
    if not word.isprintable():
        raise ConfigError(f"{word!r}: expected a value without line breaks and control characters.")


def _check_syntax(line: str) -> None:
    checked = subprocess.run(["bash", "-n", "-c", line], capture_output=True, text=True)
    if checked.returncode:
        raise ConfigError(
            f"--environment {line!r}: not a valid line of bash: {checked.stderr.strip().splitlines()[0]}."
        )
