"""What happens when a run diverges: it ends, or it goes back to its newest healthy checkpoint and skips what it has read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from incr_ds.config.training import RunSettings
from incr_ds.errors import IncrError
from incr_ds.train.checkpoints import TrainingState
from incr_ds.train.metrics import RollBackRow


class DivergedError(IncrError):
    """The run no longer learns: its loss is not a number or rose, or its gradients are not finite.

    ``state`` is where it stood, ``problem`` the reason, and ``healthy`` the checkpoint to go back to, if there is one.
    """

    def __init__(self, message: str, state: TrainingState, problem: str, healthy: Path | None) -> None:
        super().__init__(message)
        self.state, self.problem, self.healthy = state, problem, healthy


def next_sample(run: RunSettings, state: TrainingState) -> int:
    """The number of the first sample that the next step reads."""
    return run.data.start_sample + state.position.consumed_samples + state.skipped_samples


def may_roll_back(run: RunSettings, error: DivergedError) -> bool:
    """Whether the run goes back after ``error``. It does not if it has nothing to go back to, or has done so too often."""
    settings = run.divergence
    allowed = settings.action == "roll_back" and error.state.roll_backs < settings.max_roll_backs
    return allowed and error.healthy is not None


def rolled_back(run: RunSettings, error: DivergedError, saved: TrainingState) -> tuple[TrainingState, RollBackRow]:
    """Continue from ``saved``, the state of the healthy checkpoint, behind the last sample that the run has read.

    What it has spent stays spent: FLOPs go on from where it diverged.
    """
    diverged = error.state
    number = diverged.roll_backs + 1
    skipped = diverged.position.consumed_samples + diverged.skipped_samples - saved.position.consumed_samples
    position = replace(saved.position, flops=diverged.position.flops)
    row = RollBackRow(
        number=number,
        from_step=diverged.position.step,
        first_sample=next_sample(run, saved),
        last_sample=next_sample(run, diverged) - 1,
        reason=error.problem,
    )
    return replace(saved, position=position, roll_backs=number, skipped_samples=skipped), row
