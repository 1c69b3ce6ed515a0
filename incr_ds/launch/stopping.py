"""Requests to stop, by signal or by the end of the launcher, from before torch is imported to the end of the process."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import psutil

# The exit code of a run that was stopped on request and can be started again: EX_TEMPFAIL of sysexits.h.
STOPPED = 75

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 0.5
# Processes that adopt orphans. If a launcher's parent is one of these, the command that started the launcher has ended.
REAPERS = ("systemd", "init", "tini", "dumb-init", "docker-init")


class StopRequest:
    """A context in which a signal, or the end of the launcher, is a request to stop.

    Until ``join`` is called there is nothing to save, and a request ends the process at once with exit code STOPPED.
    Afterwards the request is kept in ``reason`` for the training loop. A second SIGINT raises Python's KeyboardInterrupt.
    SIGHUP is not handled if the process ignores it (nohup).
    """

    def __init__(self, launchers: tuple[psutil.Process, ...] = ()) -> None:
        self.reason: str | None = None
        self._joined = False
        self._previous: dict[signal.Signals, Any] = {}
        self._launchers = launchers
        self._over = threading.Event()

    def __enter__(self) -> Self:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._heed)
        if self._launchers:
            threading.Thread(target=self._watch, daemon=True, name="launcher watch").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def join(self) -> None:
        """Mark this process as one of a group: from now on a request is only noted, and the group decides together."""
        self._joined = True

    def request(self, reason: str) -> None:
        """Request a stop. ``reason`` is shown to the user."""
        if not self._joined:
            _leave(reason)
        self.reason = self.reason or reason

    def _heed(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS):
            if not all(map(_is_alive, self._launchers)):
                self.request("the end of the launcher")
                return


def launchers(started_by_deepspeed: bool) -> tuple[psutil.Process, ...]:
    """The processes whose end stops this rank: its launcher, and the command that started the launcher.

    The deepspeed command starts ``deepspeed.launcher.launch``, which starts the ranks; a signal to the command ends only
    the command. torchrun and Slurm's srun start the ranks directly. Returns () if no launcher started this process. Ends
    the process if its launcher has already ended.
    """
    try:
        parent = psutil.Process().parent()
        if (
            parent is not None
            and not started_by_deepspeed
            and {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & set(os.environ)
        ):
            return (parent,)
        if parent is None or not started_by_deepspeed:
            return ()
        if "deepspeed.launcher.launch" not in " ".join(parent.cmdline()):
            return () if not _is_reaper(parent) else _leave("the end of the launcher")
        command = parent.parent()
        if command is None or _is_reaper(command):
            # On several nodes a remote shell started the launcher. On one node it was the command, which has ended.
            return (parent,) if os.environ.get("CROSS_SIZE", "1") != "1" else _leave("the end of the launcher")
        return parent, command
    except psutil.Error:
        return ()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _is_reaper(process: psutil.Process) -> bool:
    """Whether a process is one that adopts orphans. In a container, process 1 may be the deepspeed command itself."""
    adopts = process.pid == 1 or process.name() in REAPERS
    return adopts and "deepspeed" not in " ".join(process.cmdline())


def _leave(reason: str) -> Any:
    """End the process now. An exception could be caught by whatever is being imported."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"pretrain: stopped by {reason} during start-up; nothing was changed.\n".encode())
    os._exit(STOPPED)
