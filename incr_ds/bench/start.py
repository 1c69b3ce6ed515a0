"""Times the start of a run as its user waits for it: from the command to the first step."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml

from incr_ds.config.training import RunSettings
from incr_ds.data.megatron import IndexedDatasetBuilder
from incr_ds.testing.processes import free_port

ROOT = Path(__file__).parent.parent.parent


def startup_seconds(run: RunSettings, config: Mapping[str, Any], starts: int) -> dict[str, Any] | None:
    """Median seconds from the command to the first step, by part, and of the imports that no run can do without.

    ``run`` trains the model of ``config`` for one step, in one process; its config and data are written for it. None if
    ``starts`` is 0.
    """
    if not starts:
        return None
    with tempfile.TemporaryDirectory() as folder:
        run_file = write_run(run, config, Path(folder))
        runs, floors = [], []
        for number in range(starts):
            floors.append(_floor(Path(folder)))
            output = ["--set", f"output={folder}/run{number}"]
            runs.append(_timed_start([sys.executable, "launchers/pretrain.py", "--config", str(run_file), *output]))
    parts = {part: median(run[part] for run in runs) for part in runs[0]}
    floor = {part: median(run[part] for run in floors) for part in floors[0]}
    return {"run": parts, "imports_and_model": floor}


FLOOR = """
import sys
import deepspeed, transformers
model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(sys.argv[1]))
print("built", flush=True)
"""


def _floor(folder: Path) -> dict[str, float]:
    return _timed(["-c", FLOOR, str(folder)], {"built": "seconds"})


def _timed_start(arguments: Sequence[str]) -> dict[str, float]:
    return _timed(arguments[1:], {"layout: ": "seconds", "step 1/1  loss": "to_step_1"})


def _timed(arguments: Sequence[str], marks: Mapping[str, str]) -> dict[str, float]:
    """Wall seconds until a line with each mark is printed, and the CPU seconds of the whole process."""
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environment = {**os.environ, **alone, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    before, began, found = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), dict[str, float]()
    with subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=environment,
    ) as process:
        lines = []
        for line in _lines(process):
            lines.append(line)
            for mark, name in marks.items():
                if mark in line:
                    found.setdefault(name, time.perf_counter() - began)
    if process.returncode or set(found) != set(marks.values()):
        raise RuntimeError(f"{' '.join(arguments)} failed with exit code {process.returncode}:\n{''.join(lines)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found | {"cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    yield from process.stdout


def write_run(run: RunSettings, config: Mapping[str, Any], folder: Path) -> Path:
    """Write a run file for ``run`` into ``folder``, with the model's ``config`` and random data. Returns its path."""
    (folder / "config.json").write_text(json.dumps(config))
    builder = IndexedDatasetBuilder(f"{folder}/data.bin", dtype=np.uint16)
    for document in torch.randint(
        0, config["vocab_size"], (20, 200), generator=torch.Generator().manual_seed(0)
    ).tolist():
        builder.add_document(document, [len(document)])
    builder.finalize(f"{folder}/data.idx")
    content = run.model_dump(mode="json", exclude_defaults=True)
    content |= {"model": {"config": f"{folder}/config.json"}, "data": {"train": [{"prefix": f"{folder}/data"}]}}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
