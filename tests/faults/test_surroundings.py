"""What a machine may lack, and jobs that meet on it: the run is the same, or a message says what is wrong."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from fault_runs import Started, assert_equal_runs, curve, newest, write_material, write_run

pytestmark = pytest.mark.slow
SHORT = {
    "schedule": {"train_steps": 9, "learning_rate": 1e-2, "warmup_steps": 2},
    "growth": [],
    "checkpoint": {"interval": 3, "keep_last": 2},
}
JUMPS = """
import time

_time, _start = time.time, time.time()


def jumping():
    now = _time()
    return now + (0 if now - _start < {after} else {seconds})


time.time = jumping
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    material = write_material(tmp_path_factory.mktemp("surroundings") / "material")
    output = material.parent / "calm"
    assert Started(write_run(material, output, **SHORT)).end() == 0
    return material, output


def without_compiler(folder):
    """A PATH with what a run needs, but no compiler."""
    folder.mkdir()
    for name in ("bash", "sh", "env", "hostname", "uname", "which", "ls", "rm", "cat", "git"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return f"{Path(sys.executable).parent}:{folder}"


def jumping_clock(folder, seconds):
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(JUMPS.format(after=6, seconds=seconds))
    return f"{folder}:{Path(__file__).parents[2]}"


SURROUNDINGS = {
    "no HOME": lambda folder: ({"HOME": None, "XDG_CACHE_HOME": None}, ()),
    "a HOME that cannot be written": lambda folder: ({"HOME": "/proc", "XDG_CACHE_HOME": None}, ()),
    "no compiler": lambda folder: ({"PATH": without_compiler(folder), "CC": None, "CXX": None}, ()),
    "no network": lambda folder: ({}, ("unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$0" "$@"')),
    "a clock that jumps back an hour": lambda folder: ({"PYTHONPATH": jumping_clock(folder, -3600)}, ()),
    "a clock that jumps ahead a day": lambda folder: ({"PYTHONPATH": jumping_clock(folder, 86400)}, ()),
}


@pytest.mark.timeout(900)
def test_surroundings(calm, tmp_path, tried):
    material, reference = calm
    for number, (name, make) in enumerate(SURROUNDINGS.items()):
        if name == "no network" and (os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip")):
            continue
        output = tmp_path / f"run{number}"
        changes, within = make(tmp_path / f"extra{number}")
        with tried.case(name):
            run = Started(write_run(material, output, **SHORT), changes=changes, within=within)
            assert run.end() == 0, run.log.read_text()[-2000:]
            assert_equal_runs(output, reference)
    tried.note = f"{', '.join(SURROUNDINGS)}: the same curve, weights and moments"


@pytest.mark.timeout(600)
def test_two_jobs(calm, tmp_path, tried):
    material, reference = calm
    with tried.case("on one host"):
        runs = [Started(write_run(material, tmp_path / name, **SHORT)) for name in ("one", "two")]
        assert [run.end() for run in runs] == [0, 0]
        for name in ("one", "two"):
            assert_equal_runs(tmp_path / name, reference)
    with tried.case("on one folder"):
        output = tmp_path / "same"
        endless = SHORT | {"schedule": {"train_steps": 100000, "learning_rate": 1e-2, "warmup_steps": 2}}
        first = Started(write_run(material, output, **endless))
        assert first.wait_for(lambda: newest(output) is not None), first.log.read_text()[-2000:]
        shutil.copyfile(first.run_file, other := tmp_path / "again.yaml")
        second = Started(other)
        code, shown = second.end(), second.log.read_text()
        before = len(curve(output))
        assert code == 2 and "is writing to it; wait for it" in shown and "Traceback" not in shown, (
            code,
            shown[-2000:],
        )
        assert first.wait_for(lambda: len(curve(output)) > before, 20)
        first.kill_all()
    first.close()
    with tried.case("on a folder whose job was killed"):
        assert Started(write_run(material, output, **SHORT)).end() in (0, 2)
    tried.note = (
        "each its own curve; on one folder the second is refused, the first goes on, and a kill leaves no lock behind"
    )
