"""When saving fails: every save is tried twice, and a run goes on for a stated number of failed ones."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from incr_ds.config.training import CheckpointSettings
from incr_ds.errors import CheckpointError
from incr_ds.train.checkpoints import PendingSave, TrainingState


class Saves(Protocol):
    """What a Saver needs of a job."""

    def begin(self, state: TrainingState) -> PendingSave:
        """Begin to save ``state``."""
        ...

    def prune(self, newest: Path) -> None:
        """Delete the checkpoints that need not be kept beside ``newest``."""
        ...


class Saver:
    """Saves one stage's checkpoints. All ranks call its methods in the same order. ``newest`` is the newest checkpoint.

    A save that fails is tried once more. If that fails, too, training goes on without it, until
    ``checkpoint.max_failures`` saves in a row have failed.
    """

    def __init__(
        self, saves: Saves, settings: CheckpointSettings, newest: Path | None, say: Callable[[str], None]
    ) -> None:
        self.newest = newest
        # Whether a save in the background has failed, so that the next healthy step has to be saved instead.
        self.due = False
        self._saves, self._settings, self._say = saves, settings, say
        self._pending: PendingSave | None = None
        self._failures = 0

    def save(self, state: TrainingState, *, must: bool) -> None:
        """Save ``state``. With checkpoint.background it is published by a later ``poll`` or ``finish``.

        With ``must``, it is published now, or CheckpointError is raised. Otherwise CheckpointError is raised only if too many
        saves have failed.
        """
        self.finish()
        again, self.due = self.due, False
        error = self._attempt(state, now=must or again or not self._settings.background)
        if error is not None and (must or not again):
            self._say(f"{_text(error)} Trying once more.")
            error = self._attempt(state, now=True)
        if error is None:
            return
        self._failures += 1
        if must or self._failures > self._settings.max_failures:
            raise error
        self._say(
            f"{_text(error)} Training goes on without this checkpoint: failed save {self._failures} in a row of "
            f"{self._settings.max_failures} allowed (checkpoint.max_failures)."
        )

    def poll(self) -> bool:
        """Publish the save that is under way if every rank has written it. Returns whether this call waited for anything."""
        if self._pending is None or not self._pending.is_written():
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Wait for the save that is under way, and publish it. If that fails, another one is ``due``."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            self._published(pending.publish())
        except (CheckpointError, OSError) as error:
            self.due = True
            self._say(f"{_text(error)} The next healthy step is saved instead.")

    def _attempt(self, state: TrainingState, *, now: bool) -> CheckpointError | OSError | None:
        """Save ``state``, or begin to if not ``now``. Returns the error if that fails."""
        try:
            pending = self._saves.begin(state)
            if now:
                self._published(pending.publish())
            else:
                self._pending = pending
        except (CheckpointError, OSError) as error:
            return error
        return None

    def _published(self, folder: Path) -> None:
        self.newest, self._failures = folder, 0
        self._say(f"saved {folder}")
        try:
            self._saves.prune(folder)
        except OSError as error:
            self._say(f"old checkpoints were not deleted: {_text(error)}")


def _text(error: CheckpointError | OSError) -> str:
    if isinstance(error, OSError):
        return f"saving failed: {error.strerror or errno.errorcode.get(error.errno or 0)}: {error.filename}."
    return str(error)
