"""Coverage-guided fuzzing of every reader: one clear error, bounded time and memory, no code of the input, no altered values."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, corpus_file

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(sys.platform != "linux", reason="atheris is built for Linux"),
]
ROOT = Path(__file__).parents[2]
LONGEST, MOST_MEMORY = 20, 3000  # seconds of one input, MB
MOST_DEATHS = 5
OPTIONS = ("-print_final_stats=1", f"-timeout={LONGEST}", f"-rss_limit_mb={MOST_MEMORY}")


def fuzz(name, folder, seconds):
    """Fuzz a target. Returns the number of executions and the defects found, each with its input's file in ``folder``."""
    for part in ("corpus", "findings"):
        (folder / part).mkdir(parents=True)
    if (known := corpus_file(name)).exists():
        zipfile.ZipFile(known).extractall(folder / "corpus")
    end, executions, deaths = time.monotonic() + seconds, 0, []
    while (left := int(end - time.monotonic())) > 0 and len(deaths) < MOST_DEATHS:
        done = run(name, folder, f"-max_total_time={left}", f"-artifact_prefix={folder / 'findings'}/")
        executions += sum(map(int, re.findall(r"number_of_executed_units: (\d+)", done.stderr)))
        if done.returncode:
            deaths.append({"place": f"the process ended with {done.returncode}", "text": done.stderr[-3000:]})
    lines = folder / "findings" / "findings.jsonl"
    found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    return executions, [*found, *deaths]


def run(name, folder, *options):
    """One process that fuzzes."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'support'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "support" / "fuzzing.py", name, folder / "work"]
    command += [folder / "findings", folder / "corpus", *OPTIONS, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", env=environment)


@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", TARGETS)
def test_fuzzing(tmp_path, tried, request, name):
    seconds = 60 * request.config.getoption("--soak-minutes") / len(TARGETS)
    fast = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    folder = fast / f"fuzzing-{os.getpid()}-{name}"
    try:
        executions, defects = fuzz(name, folder, seconds)
        for defect in defects:
            with tried.case(defect["place"]):
                raise AssertionError(defect["text"])
        corpus = len(list((folder / "corpus").iterdir()))
        if kept := request.config.getoption("--fuzz-corpus"):
            for part in ("corpus", "findings"):
                shutil.copytree(folder / part, kept / name / part, dirs_exist_ok=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tried.tried, tried.passed = executions, executions - len(defects)
    tried.note = f"executions in {seconds / 60:.1f} minutes; {corpus} inputs that reach code of their own"
