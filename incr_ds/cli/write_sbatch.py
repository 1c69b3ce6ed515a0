"""Writes a Slurm batch script for a run, or a hostfile and the command for the deepspeed launcher."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from incr_ds.cli.command import command, console
from incr_ds.errors import ConfigError

if TYPE_CHECKING:
    from incr_ds.launch.nodes import Nodes


@command
def main(
    config: Annotated[
        list[Path], typer.Argument(metavar="RUN.yaml...", help="Run file; later files win, section by section.")
    ],
    override: Annotated[
        list[str] | None, typer.Option("--set", help="key.path=value over the run file; repeatable.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Default: as many as the layout's ranks fill.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="GPUs, and ranks, on a node. Default: 8, or all ranks if they are fewer.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="Time limit in Slurm's format. Default: 24:00:00.")] = None,
    partition: Annotated[str | None, typer.Option(help="Default: the cluster's.")] = None,
    account: Annotated[str | None, typer.Option(help="Default: yours.")] = None,
    job_name: Annotated[str | None, typer.Option(help="Default: the run file's name.")] = None,
    signal_seconds: Annotated[
        int | None, typer.Option(help="Save this many seconds before the time limit. Default: 300.")
    ] = None,
    cpus_per_task: Annotated[int | None, typer.Option(help="CPU cores of each rank. Default: 8.")] = None,
    environment: Annotated[
        str | None,
        typer.Option(help="Shell line that activates the environment. Default: the virtual environment in use."),
    ] = None,
    hosts: Annotated[
        str | None,
        typer.Option(help="Host names, as node1,node2: write a hostfile and the deepspeed launcher's command instead."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="File to write. Default: standard output.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Write the script that trains a run on Slurm: it saves before the time limit and queues itself again.

    The script starts the run in the folder in which you run this. Read it, and submit it with sbatch.
    """
    from incr_ds.config.fields import load_settings
    from incr_ds.config.training import RunSettings
    from incr_ds.launch.batch_script import job_name as name_of
    from incr_ds.launch.batch_script import launch_words
    from incr_ds.launch.nodes import divide

    _check_place(output, overwrite=overwrite)
    filled = divide(load_settings(config, RunSettings, override).layout, nodes, gpus_per_node)
    words = launch_words(config, override or [])
    of_slurm = {"time": time, "partition": partition, "account": account, "signal_seconds": signal_seconds}
    of_slurm |= {"name": job_name, "cpus_per_task": cpus_per_task}
    stated = {name: value for name, value in of_slurm.items() if value is not None}
    if hosts is None:
        text = _script(filled, words, {"name": name_of(config[-1]), **stated}, environment)
    else:
        text = _hostfile(filled, words, hosts, output, [*stated, *(["environment"] if environment else [])])
    _deliver(text, output)
    if output is not None:
        start = (
            "its comments say how to start the run" if hosts else f"submit it with: sbatch {shlex.quote(str(output))}"
        )
        console.print(f"wrote {output}: {filled}; {start}", markup=False)


def _script(nodes: Nodes, words: list[str], stated: dict[str, Any], environment: str | None) -> str:
    from incr_ds.launch.batch_script import BatchJob, batch_script

    return batch_script(BatchJob(nodes, **stated), words, Path.cwd(), environment or _active_environment())


def _hostfile(nodes: Nodes, words: list[str], hosts: str, output: Path | None, stated: list[str]) -> str:
    from incr_ds.launch.batch_script import launch_file
    from incr_ds.launch.nodes import hostfile

    if stated:
        option = {"name": "job-name"}.get(stated[0], stated[0]).replace("_", "-")
        raise ConfigError(
            f"--{option}: without effect with --hosts, since a hostfile asks nothing of Slurm; remove one."
        )
    name = "hostfile" if output is None else str(output)
    return launch_file(hostfile(hosts.split(","), nodes), words, Path.cwd(), name, nodes)


def _check_place(output: Path | None, *, overwrite: bool) -> None:
    """Raise ConfigError unless the run can start in this folder and ``output`` can be written."""
    from incr_ds.checkpoint.publish import check_writable
    from incr_ds.launch.batch_script import PROGRAM

    if not PROGRAM.is_file():
        raise ConfigError(
            f"{PROGRAM}: not in {Path.cwd()}; run this in the folder of the repository, where the run starts."
        )
    if output is None:
        if overwrite:
            raise ConfigError("--overwrite: without effect; add --output, or remove it.")
        return
    if output.is_dir():
        raise ConfigError(f"{output}: a folder; name a file in it.")
    if output.exists() and not overwrite:
        raise ConfigError(f"{output}: exists already; choose another name, or add --overwrite to replace it.")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: the folder {output.parent} does not exist; create it, or choose another.")
    check_writable(output.parent)


def _active_environment() -> str:
    script = Path(sys.prefix) / "bin" / "activate"
    if not script.is_file():
        raise ConfigError(
            f"--environment: expected a value, such as 'conda activate NAME'; {sys.prefix} has no bin/activate."
        )
    return f"source {shlex.quote(str(script))}"


def _deliver(text: str, output: Path | None) -> None:
    from incr_ds.checkpoint.publish import write_atomically

    if output is None:
        typer.echo(text, nl=False)
    else:
        write_atomically(output, text)
