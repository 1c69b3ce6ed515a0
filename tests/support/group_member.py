"""Child processes of test_grow_together: tools/grow_checkpoint.py, with a fault or without."""

import errno
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import grow_checkpoint

from incr_ds.checkpoint import sink, workspace
from incr_ds.cli.command import console, errors


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def killed(self, path, digest):
    os.kill(os.getpid(), signal.SIGKILL)


def run(environment, fault, arguments, captured):
    """The tool with ``arguments`` as a launcher would start it; what it prints goes to ``captured``.out and .err."""
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    sys.argv = ["grow_checkpoint.py", *arguments]
    for number, ending in ((1, "out"), (2, "err")):
        descriptor = os.open(f"{captured}.{ending}", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    console.file, errors.file = sys.stdout, sys.stderr
    _break(fault)
    try:
        grow_checkpoint.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _break(fault):
    recipe = sys.argv.index("--recipe") + 1
    if fault == "disk":
        sink.Sink.write = full_disk
    elif fault == "kill":
        workspace.Workspace.record = killed
    elif fault == "recipe":
        sys.argv[recipe] += ".missing"
    elif fault == "plan":
        own = Path(sys.argv[sys.argv.index("--output") + 1]).parent / "own.yaml"
        own.write_text("target: {}\n")
        sys.argv[recipe] = str(own)
