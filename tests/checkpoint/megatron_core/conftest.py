"""Counts the tests that a release of megatron-core passes, and writes it down if asked (make test-megatron)."""

import json
import platform
import time
from collections import Counter
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

OUTCOMES = pytest.StashKey[dict[str, str]]()
WORST_FIRST = ("failed", "skipped", "passed")
BEGAN = pytest.StashKey[float]()
PACKAGES = ("torch", "transformers", "numpy")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--megatron-report", type=Path, help="Folder for megatron.json and megatron.md.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    outcomes = item.config.stash.setdefault(OUTCOMES, {})
    item.config.stash.setdefault(BEGAN, time.time() - report.duration)
    phases = (outcomes.get(item.nodeid, "passed"), report.outcome)
    outcomes[item.nodeid] = min(phases, key=WORST_FIRST.index)
    return report


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    folder = session.config.getoption("--megatron-report")
    outcomes = session.config.stash.get(OUTCOMES, {})
    if folder is not None and outcomes and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        seconds = round(time.time() - session.config.stash[BEGAN])
        write_report(folder, version("megatron-core"), Counter(outcomes.values()), seconds)


def write_report(folder: Path, release: str, outcomes: Counter[str], seconds: int) -> None:
    """Write the row of a release. Rows of other releases stay: each has a run of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "megatron.json"
    before = json.loads(path.read_text(encoding="utf-8"))["releases"] if path.exists() else {}
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    counts = {"tests": outcomes.total(), "passed": outcomes["passed"], "skipped": outcomes["skipped"]}
    row = counts | {"seconds": seconds, "date": date.today().isoformat()}
    rows = {**before, release: row | {"versions": versions}}
    rows = dict(sorted(rows.items(), key=lambda item: Version(item[0])))
    content = {"command": "make test-megatron", "machine": platform.platform(), "releases": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = ["# Releases of Megatron-core", "", "    make test-megatron", ""]
    lines += ["| Megatron-core | tests | passed | skipped | seconds | date | with |", "|---|---|---|---|---|---|---|"]
    lines += [_line(name, found) for name, found in rows.items()]
    (folder / "megatron.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(release: str, row: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    counts = " | ".join(f"{row[key]:,}" for key in ("tests", "passed", "skipped", "seconds"))
    return f"| {release} | {counts} | {row['date']} | {versions} |"
