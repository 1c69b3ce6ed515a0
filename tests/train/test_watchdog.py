"""A process that hangs shows where it stands, and ends with a code of its own. Each hang is in a process of its own."""

import subprocess
import sys
import time

import pytest

from incr_ds.train.watchdog import HUNG

HANG = """
import sys, time, threading
from pathlib import Path
from incr_ds.train import watchdog
watchdog.GRACE = 0.3

def working(dog):
    for _ in range(8):
        time.sleep(0.2)
        dog.beat()

def stuck_in_python():
    time.sleep(60)

def stuck_with_the_lock():
    import ctypes
    ctypes.PyDLL(None).sleep(60)

def ends():
    print("ended")

with watchdog.Watchdog(Path(sys.argv[1]), 3, None if sys.argv[3] == "never" else float(sys.argv[3])) as dog:
    working(dog)
    print("worked", flush=True)
    globals()[sys.argv[2]]()
time.sleep(1.5)
"""


def hang(folder, how, seconds="1"):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANG, str(folder), how, seconds], capture_output=True, text=True, timeout=50
    )
    return done, time.monotonic() - began


def test_a_hang_ends_with_the_stacks_of_all_threads(tmp_path):
    done, took = hang(tmp_path, "stuck_in_python")
    assert done.returncode == HUNG == 76 and done.stdout == "worked\n"
    assert "rank 3 on " in done.stderr and "no progress for 1 s (watchdog_seconds); its threads:" in done.stderr
    assert "in stuck_in_python" in done.stderr and "watchdog.py" in done.stderr
    assert (tmp_path / "stacks" / "rank_00003.txt").read_text() in done.stderr
    assert took > 1.6 + 1.0


def test_a_hang_in_which_no_python_code_can_run_ends_too(tmp_path):
    done, _ = hang(tmp_path, "stuck_with_the_lock")
    assert done.returncode == 1 and "in stuck_with_the_lock" in done.stderr and "Timeout" in done.stderr


@pytest.mark.parametrize("seconds", ["1", "never"])
def test_a_process_that_ends_in_time_is_left_alone(tmp_path, seconds):
    done, _ = hang(tmp_path, "ends", seconds)
    assert (done.returncode, done.stdout, done.stderr) == (0, "worked\nended\n", "")
    assert not (tmp_path / "stacks").exists()
