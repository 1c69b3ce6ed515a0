"""docs/tutorials, executed: each page's files and commands as they stand, and what the page says that you should see."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from incr_ds.train.metrics import read_metrics

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
# A fenced block: its language, the name of the file that it is (if it is one), and its lines.
BLOCK = re.compile(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"\d[\d,]*(\.\d+)?(e[+-]?\d+)?")
RUNS = {
    "grow_your_own_checkpoint": "grown",
    "grow_a_hugging_face_model": "larger",
    "continue_a_megatron_deepspeed_run": "continued",
}


def blocks(page):
    return BLOCK.findall(page.read_text())


def script(page):
    """The page as one program of bash. The output of the commands in a block goes to a file of its own."""
    lines = ["set -euo pipefail"]
    for number, (language, name, content) in enumerate(blocks(page)):
        if name:
            lines.append(f"printf %s {shlex.quote(content)} > {name}")
        elif language == "sh":
            lines.append(f"{{\n{content}}} > block_{number}.log 2>&1")
    return "\n".join(lines)


def plain(line):
    """A line without its numbers and its spacing: what a page can promise on every machine."""
    return " ".join(NUMBER.sub("N", line).split())


def is_said(line, output):
    """Whether the output has a line of a page. A line that ends in ... is the beginning of one."""
    wanted, found = plain(line), [plain(one) for one in output.splitlines()]
    beginning = wanted.removesuffix("...")
    return wanted in found or (beginning != wanted and any(one.startswith(beginning.rstrip()) for one in found))


def launcher(folder):
    """A folder with a ``deepspeed`` that gives every run a port of its own, since other tests run beside this one."""
    folder.mkdir()
    free = "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])"
    real = Path(sys.executable).parent / "deepspeed"
    command = folder / "deepspeed"
    command.write_text(f'#!/bin/sh\nexec {real} --master_port "$({sys.executable} -c "{free}")" "$@"\n')
    command.chmod(0o755)
    return folder


def environment(tmp_path):
    """What a reader's shell has, without the accelerator that the pages choose themselves."""
    path = f"{launcher(tmp_path / 'bin')}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if name not in ("DS_ACCELERATOR", "OMP_NUM_THREADS")}
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_page_is_what_happens(page, tmp_path: Path):
    folder = tmp_path / "repository"
    folder.mkdir()
    for name in ("tools", "launchers", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(["bash", "-c", script(page)], cwd=folder, env=environment(tmp_path), timeout=1700)
    logs = sorted(folder.glob("block_*.log"), key=lambda log: int(log.stem.removeprefix("block_")))
    assert done.returncode == 0, logs[-1].read_text()
    for number, (language, _, content) in enumerate(blocks(page)):
        if language == "text":
            said = [log for log in logs if int(log.stem.removeprefix("block_")) < number][-1].read_text()
            assert [line for line in content.splitlines() if not is_said(line, said)] == [], said
    rows = read_metrics(folder / "runs" / RUNS[page.stem] / "metrics.jsonl")
    held_out = [row["loss"] for row in rows if row["kind"] == "evaluation"]
    assert len(held_out) == 3 and held_out[-1] < held_out[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_messages_of_the_page_exist(page):
    """What a page quotes of a message is in the code that raises it, over the ends of its string literals."""
    code = "".join(path.read_text() for path in (ROOT / "incr_ds").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", code)
    messages = re.findall(r"^\| `([^`]+)` \|", page.read_text().partition("## When it goes wrong")[2], re.M)
    assert len(messages) >= 4
    assert [message for message in messages if message not in joined] == []
