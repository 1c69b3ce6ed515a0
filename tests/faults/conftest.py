"""Counts what was tried and what was survived, and writes it down if asked (make faults)."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

TRIED = pytest.StashKey[list["Tried"]]()
PACKAGES = ("torch", "deepspeed", "transformers", "megatron-core", "numpy")


@dataclass
class Tried:
    """One test of the suite: how many faults it caused, and how many of them had the outcome that it asks for."""

    name: str
    tried: int = 0
    passed: int = 0
    seconds: float = 0.0
    note: str = ""
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One fault. A failed assertion counts, and the next fault is still tried."""
        self.tried += 1
        try:
            yield
        except AssertionError as error:
            self.failures.append(f"{name}: {error}")
        else:
            self.passed += 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults-report", type=Path, help="Folder for faults.json and faults.md.")
    parser.addoption("--soak-minutes", type=float, default=120, help="How long the soak, and fuzzing, take.")
    parser.addoption("--fuzz-corpus", type=Path, help="Folder that gets what fuzzing has collected.")


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Iterator[Tried]:
    """Where a test counts. Its faults that failed fail the test at its end."""
    words = request.node.name.removeprefix("test_").replace("_", " ")
    found, began = Tried(words), time.monotonic()
    request.config.stash.setdefault(TRIED, []).append(found)
    yield found
    found.seconds = round(time.monotonic() - began, 1)
    assert found.tried, "this test has tried nothing"
    assert not found.failures, f"{len(found.failures)} of {found.tried} failed:\n" + "\n".join(found.failures)


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder = session.config.getoption("--faults-report")
    found = [row for row in session.config.stash.get(TRIED, []) if row.tried]  # none if the test was interrupted
    if folder is not None and found:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # another part of the suite may end at the same time
            write_report(found, folder)
        finally:
            os.close(descriptor)


def write_report(found: list[Tried], folder: Path) -> None:
    """Write the rows of the tests that ran. Rows of other tests stay: the suite may run in parts."""
    versions = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    path, today = folder / "faults.json", date.today().isoformat()
    before = json.loads(path.read_text(encoding="utf-8"))["tests"] if path.exists() else []
    rows = {row["name"]: row for row in before}
    for item in found:
        row = {key: value for key, value in asdict(item).items() if key != "failures"}
        rows[item.name] = row | {"date": today}
    content = {
        "command": "make faults",
        "machine": platform.platform(),
        "versions": versions,
        "tests": [*rows.values()],
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    lines = ["# Faults: what was tried, and what was survived", "", "    make faults", ""]
    lines += [f"{platform.platform()}, " + ", ".join(f"{name} {number}" for name, number in versions.items()) + ".", ""]
    lines += ["| fault | tried | survived | seconds | date | note |", "|---|---|---|---|---|---|"]
    lines += [_line(row) for row in rows.values()]
    (folder / "faults.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _line(row: dict[str, Any]) -> str:
    counts = f"{row['tried']:,} | {row['passed']:,} | {row['seconds']:,.0f}"
    return f"| {row['name']} | {counts} | {row['date']} | {row['note']} |"
