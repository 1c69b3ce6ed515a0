"""Child processes of test_grow_limits, and what both sides know."""

import os
import signal
from pathlib import Path

from incr_ds.checkpoint import workspace
from incr_ds.offline.plan import GrowthRequest, plan_request
from incr_ds.offline.run import grow_checkpoint

# Every point at which a run can be cut off: around each note in the journal, and around each step of publishing.
POINTS = ["before note", "after note", "before seal", "before reveal", "after reveal"]


def grow_until(folder, workers, point, number):
    """Grow folder/source by folder/recipe.yaml into folder/out, and be killed at the ``number``-th ``point``."""
    if point == "before note":
        _kill(workspace.Workspace, "record", number, before=True)
    elif point == "after note":
        _kill(workspace.Workspace, "record", number, before=False)
    elif point == "before seal":
        _kill(workspace, "seal", 0, before=True)
    elif point == "before reveal":
        _kill(workspace, "reveal", 0, before=True)
    else:
        _kill(workspace, "reveal", 0, before=False)
    folder = Path(folder)
    request = GrowthRequest(folder / "source", folder / "recipe.yaml", folder / "out", workers=workers)
    grow_checkpoint(plan_request(request))


def _kill(owner, name, number, *, before):
    original = getattr(owner, name)
    calls = []

    def dying(*arguments):
        calls.append(name)
        if before and len(calls) > number:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments)
        if not before and len(calls) > number:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, dying)
