"""Requests to stop, in processes of their own: signals at any moment, and launchers that end first."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest

from incr_ds.launch.stopping import STOPPED, StopRequest

RANK = """
import sys, time
from incr_ds.launch.stopping import StopRequest, launchers
with StopRequest(launchers(started_by_deepspeed=True)) as stop:
    if sys.argv[1] == "joined":
        stop.join()
    print("ready", flush=True)
    while stop.reason is None:
        time.sleep(0.01)
    print("stopped by", stop.reason, flush=True)
"""
# Stands for deepspeed.launcher.launch, whose name its command line holds, and which starts the rank.
LAUNCH = """
import subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], stderr=subprocess.STDOUT)
time.sleep(60)
"""
# Stands for the deepspeed command.
COMMAND = """
import subprocess, sys, time
launch = subprocess.Popen([sys.executable, "-c", *sys.argv[1:4], "deepspeed.launcher.launch"], stderr=subprocess.DEVNULL)
print(launch.pid, flush=True)
time.sleep(60)
"""


@contextmanager
def started(*words):
    """A process whose standard output and errors are one pipe; ended with the block."""
    with subprocess.Popen(
        [sys.executable, "-c", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def chain(phase):
    """The deepspeed command, its launcher and a rank: the command's process and the launcher's number."""
    with started(COMMAND, LAUNCH, RANK, phase, "deepspeed") as command:
        launch = int(command.stdout.readline())
        try:
            assert command.stdout.readline() == "ready\n"
            yield command, launch
        finally:
            with suppress(ProcessLookupError):
                os.kill(launch, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
@pytest.mark.parametrize("victim", ["the command", "its launcher"])
def test_the_end_of_the_launcher_is_a_stop_for_its_ranks(victim, number):
    with chain("joined") as (command, launch):
        os.kill(command.pid if victim == "the command" else launch, number)
        assert command.stdout.readline() == "stopped by the end of the launcher\n"


def test_the_end_of_the_launcher_during_start_up_ends_the_rank_at_once():
    with chain("alone") as (command, _):
        command.kill()
        assert (
            command.stdout.readline()
            == "pretrain: stopped by the end of the launcher during start-up; nothing was changed.\n"
        )


SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])


@SIGNALS
def test_a_signal_during_start_up_ends_the_process_with_the_code_of_a_stop(number):
    with started(RANK, "alone") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(10) == STOPPED
        assert process.stdout.read() == f"pretrain: stopped by {number.name} during start-up; nothing was changed.\n"


@SIGNALS
def test_a_signal_to_a_rank_of_a_group_is_noted(number):
    with started(RANK, "joined") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.wait(10) == 0
        assert process.stdout.read() == f"stopped by {number.name}\n"


def test_a_second_interrupt_is_an_interrupt():
    with StopRequest() as stop:
        stop.join()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)


def test_handlers_come_back_and_nohup_is_respected():
    before = signal.getsignal(signal.SIGUSR1)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            stop.join()
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason is None
        assert signal.getsignal(signal.SIGUSR1) is before
    finally:
        signal.signal(signal.SIGHUP, ignored)
