"""Runs one job of a study in this process: trains its run file, then measures its last checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import torch
import yaml

from incr_ds.checkpoint.publish import read_manifest, write_atomically
from incr_ds.config.fields import parse_settings
from incr_ds.config.study import StudySettings
from incr_ds.config.training import RunSettings
from incr_ds.study.design import StudyJob
from incr_ds.train.metrics import FILE, read_metrics

RESULT, RUN_FILE, RECIPE_FILE = "result.json", "run.yaml", "recipe.yaml"


class EventStop:
    """A request to stop once ``event`` is set, in the form that the training loop asks for."""

    def __init__(self, event: Any) -> None:
        self._event = event

    @property
    def reason(self) -> str | None:
        """Why to stop, or None."""
        return "the study" if self._event.is_set() else None

    def join(self) -> None:
        """Do nothing: this process is its run's only one."""


_stop: Any = None


def initialize(event: Any, threads: int) -> None:
    """Prepare this process to run jobs, each as a run of one process."""
    global _stop
    _stop = EventStop(event)
    threading.Thread(target=_end_with_the_study, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the study itself stops its runs
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({**single, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"})
    torch.set_num_threads(threads)  # OMP_NUM_THREADS is too late if torch is imported already


def _end_with_the_study() -> None:
    """End this process when the study's own is gone: a study that is started again runs the same jobs."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def run_job(job: StudyJob, study: StudySettings) -> bool:
    """Train ``job`` to its end or until the study stops. Returns whether it has ended. Raises IncrError."""
    folder = Path(job.run["output"])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RUN_FILE, yaml.safe_dump(job.run, sort_keys=False))
    if job.recipe is not None:
        write_atomically(folder / RECIPE_FILE, yaml.safe_dump(job.recipe, sort_keys=False))
    _write_output_to(folder / "log.txt")
    run = parse_settings(job.run, RunSettings, str(folder / RUN_FILE))
    from incr_ds.train.pretraining import pretrain
    from incr_ds.train.recovery import DivergedError

    try:
        stopped = pretrain(run, stop=_stop).stopped
    except DivergedError as error:
        write_atomically(folder / RESULT, json.dumps({"diverged": str(error)}) + "\n")
        return True
    if not stopped and job.measured is not None:
        write_atomically(folder / RESULT, json.dumps(_result(job, study, run), indent=1, allow_nan=False) + "\n")
    return not stopped


def _result(job: StudyJob, study: StudySettings, run: RunSettings) -> dict[str, Any]:
    from incr_ds.study.measures import measure

    measures = measure(job.final, study.held_out, study.held_out_samples, run.batch.sequence_length)
    costs = [_cost(folder) for folder in (*job.before, job.final)]
    return {
        **asdict(measures),
        "flops": sum(flops for flops, _ in costs),
        "source_flops": sum(flops for flops, _ in costs[: job.of_source]),
        "seconds": sum(seconds for _, seconds in costs),
        "source_seconds": sum(seconds for _, seconds in costs[: job.of_source]),
    }


def _cost(checkpoint: Path) -> tuple[float, float]:
    """FLOPs of a run up to one of its checkpoints, and the seconds of its steps."""
    position: Mapping[str, Any] = read_manifest(checkpoint)["facts"]["position"]
    rows = read_metrics(checkpoint.parents[1] / FILE)
    seconds = sum(row["seconds"] for row in rows if row["kind"] == "train" and row["step"] <= position["step"])
    return float(position["flops"]), seconds


def _write_output_to(path: Path) -> None:
    """Send what this process prints to ``path``, so that runs side by side do not mix their lines."""
    sys.stdout.flush()
    with open(path, "a", encoding="utf-8") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
