"""A run's checkpoints. Each is a DeepSpeed folder with a manifest that appears whole or not at all.

    <run.output>/checkpoints/step_00000100/
        global_step100/   what DeepSpeed saved, all ranks
        latest            global_step100
        config.json       the model, so that growth and evaluation can open the folder; tokenizer files if known
        multipliers.json  learning-rate multipliers per tensor, if the run has them
        manifest.json     size and checksum of every file; layout, step, data fingerprints and settings

All ranks must call ``save_checkpoint``, ``newest_complete`` and ``saved_state``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.multipliers import Multipliers
from incr_ds.checkpoint.companions import Companions
from incr_ds.checkpoint.huggingface.writer import config_text
from incr_ds.checkpoint.publish import MANIFEST, publish, read_manifest
from incr_ds.checkpoint.runs import CHECKPOINTS, step_folder, step_folders
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.training import GrowthStart, RunSettings
from incr_ds.data.mixture import PastMix
from incr_ds.errors import CheckpointError
from incr_ds.train.hashing import digests_together, verify_together
from incr_ds.train.health import Health
from incr_ds.train.metrics import Position
from incr_ds.train.ranks import any_rank, on_every_rank, on_rank_zero
from incr_ds.train.resuming import check_continues

KIND = "deepspeed training checkpoint"
REMEDY = "Nothing was published; check space and permissions."
_SET_ASIDE = re.compile(r"(?:damaged|diverged)_step_(\d{8,})\.\d+")


class SavingEngine(Protocol):
    """What a checkpoint needs of the training engine."""

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        """Write this rank's files below folder/tag, or copy them to memory and begin to write them."""
        ...

    @property
    def is_writing(self) -> bool:
        """Whether files are still being written."""
        ...

    def finish_save(self) -> dict[Path, dict[str, Any]]:
        """Wait until they are. Returns the size and xxh3 of those that are flushed and hashed already."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run needs, besides model and optimizer, to continue as if it had not stopped.

    ``evaluated_step`` is the last step with a held-out evaluation (-1: none). ``data`` is the fingerprint per data set, and
    ``past_mixes`` are the mixes of training data that the run has read before its present one. ``roll_backs`` counts how
    often it went back to a checkpoint, and ``skipped_samples`` the samples that it left out then.
    """

    position: Position
    evaluated_step: int
    data: Mapping[str, str]
    settings: Mapping[str, Any]
    health: Health = Health()
    past_mixes: tuple[PastMix, ...] = ()
    roll_backs: int = 0
    skipped_samples: int = 0


@dataclass(frozen=True)
class PendingSave:
    """A checkpoint that all ranks write to ``folder``. Nobody sees it before ``publish``."""

    engine: SavingEngine
    final: Path
    folder: Path
    digests: dict[str, dict[str, Any]]
    stack: ExitStack

    def is_written(self) -> bool:
        """Whether every rank has written its files."""
        return not any_rank(self.engine.is_writing)

    def publish(self) -> Path:
        """Publish the checkpoint once every rank has written.

        Raises CheckpointError on all ranks if any rank could not. The checkpoint then does not appear.
        """
        with self.stack as stack:
            failed = f"{self.final}: saving failed"
            own = on_every_rank(self.engine.finish_save, failed, REMEDY)
            self.digests.update(digests_together(self.folder, failed, REMEDY, own))
            on_rank_zero(stack.close)  # publishes; the others wait here until the folder is there
        return self.final


def save_checkpoint(
    engine: SavingEngine,
    run: RunSettings,
    architecture: Architecture,
    state: TrainingState,
    multipliers: Mapping[str, Multipliers] | None = None,
) -> Path:
    """Save at the step of ``state``, publish when every rank has written, then prune.

    Raises CheckpointError on all ranks if any rank could not write. The folder then does not appear.
    """
    final = begin_save(engine, run, architecture, state, multipliers).publish()
    on_rank_zero(lambda: prune(run, final))
    return final


def begin_save(
    engine: SavingEngine,
    run: RunSettings,
    architecture: Architecture,
    state: TrainingState,
    multipliers: Mapping[str, Multipliers] | None = None,
) -> PendingSave:
    """Begin to save at the step of ``state``. ``multipliers`` are the multipliers that the engine was built with.

    Raises CheckpointError on all ranks if any rank could not write. Nothing is left behind then.
    """
    final = step_folder(Path(run.output), state.position.step)
    tag, client_state = f"global_step{state.position.step}", asdict(state)
    facts = {"layout": run.layout.model_dump(), "tag": tag, **client_state}
    digests: dict[str, dict[str, Any]] = {}
    _vacate(final)
    with ExitStack() as stack:
        folder = on_rank_zero(lambda: stack.enter_context(publish(final, KIND, facts, digests)))
        on_every_rank(lambda: engine.save(folder, tag, client_state), f"{final}: saving failed", REMEDY)
        on_rank_zero(lambda: _write_companions(folder, tag, run, architecture, multipliers))
        return PendingSave(engine, final, folder, digests, stack.pop_all())


def newest_complete(run: RunSettings, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of the run whose manifest verifies, or None if the run has no checkpoints.

    Damaged ones are reported through ``say`` of rank 0 and skipped. Raises CheckpointError if all are damaged.
    """
    problems: list[str] = []
    for folder in on_rank_zero(lambda: step_folders(Path(run.output))):
        try:
            verify_together(folder)
        except CheckpointError as error:
            problems.append(str(error))
            on_rank_zero(lambda: say(f"skipped a damaged checkpoint: {problems[-1]}"))
        else:
            return folder
    if problems:
        raise CheckpointError(
            f"{run.output}: no checkpoint of this run is whole, so it cannot resume; remove {CHECKPOINTS}/ to start over.\n  "
            + "\n  ".join(problems)
        )
    return None


def saved_state(
    run: RunSettings, folder: Path, data: Mapping[str, str], architecture: Architecture, layout: ParallelLayout
) -> TrainingState:
    """Read where one of the run's own checkpoints stands, from its manifest.

    Refuse it unless ``run``, its ``data`` (fingerprints), and the model and layout of the stage continue it.
    """
    facts = on_rank_zero(lambda: read_manifest(folder)["facts"])
    on_rank_zero(lambda: check_continues(folder, facts, run, data, architecture, layout))
    return TrainingState(
        position=Position(**facts["position"]),
        evaluated_step=facts["evaluated_step"],
        data=facts["data"],
        settings=facts["settings"],
        health=Health(**facts.get("health", {})),
        roll_backs=facts.get("roll_backs", 0),
        skipped_samples=facts.get("skipped_samples", 0),
    )


def remove_unfinished(run: RunSettings) -> None:
    """Remove unfinished checkpoints of killed runs. Only the process that holds the run's lock may call this."""
    for left in (Path(run.output) / CHECKPOINTS).glob(".step_*.incomplete-*"):
        shutil.rmtree(left, ignore_errors=True)


def set_aside_diverged(run: RunSettings) -> Path | None:
    """Rename checkpoints that were saved after the run was last healthy, so that it does not resume from them.

    Returns the newest healthy one, or None.
    """
    for folder in step_folders(Path(run.output)):
        health = _health(folder)
        if health is not None and health.is_good:
            return folder
        if health is not None:
            _set_aside(folder, "diverged")
    return None


def _vacate(final: Path) -> None:
    """Free the path ``final`` for publishing. An earlier, damaged folder of that step is renamed.

    Raises CheckpointError on all ranks if the existing folder is whole, since this run did not write it.
    """
    if not on_rank_zero(final.exists):
        return
    try:
        verify_together(final)
    except CheckpointError:
        on_rank_zero(lambda: _set_aside(final, "damaged"))
    else:
        raise CheckpointError(
            f"{final}: exists and is whole, but this run did not write it; another run has the same output. Set another "
            "output, or move that checkpoint away."
        )


def _set_aside(folder: Path, why: str) -> None:
    number = 1
    while (aside := folder.with_name(f"{why}_{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)


def _health(folder: Path) -> Health | None:
    """The run's health when it saved a checkpoint, or None if the folder has no manifest that states it."""
    try:
        return Health(**read_manifest(folder)["facts"].get("health", {}))
    except CheckpointError:
        return None


def _write_companions(
    folder: Path, tag: str, run: RunSettings, architecture: Architecture, multipliers: Mapping[str, Multipliers] | None
) -> None:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.precision]
    tokenizer = None if run.data.tokenizer is None else Path(run.data.tokenizer)
    Companions(config_text(architecture, dtype), tokenizer, multipliers or {}, {"latest": tag}).write(folder)


def prune(run: RunSettings, newest: Path) -> None:
    """Delete what ``keep_last`` and ``keep_steps`` do not keep.

    The newest healthy checkpoint stays, and those that the run is made from.
    """
    if not run.checkpoint.keep_last:
        return
    # A later folder can only be a damaged one that resuming skipped. It must not cause the removal of a whole one.
    later = {folder for folder in step_folders(Path(run.output)) if folder.name > newest.name}
    complete = [
        folder for folder in step_folders(Path(run.output)) if folder not in later and (folder / MANIFEST).is_file()
    ]
    kept = complete[: run.checkpoint.keep_last]
    healthy = next((folder for folder in complete if (health := _health(folder)) and health.is_good), None)
    for_good = [step_folder(Path(run.output), step) for step in run.checkpoint.keep_steps]
    for folder in complete:
        if folder not in (*kept, *for_good, healthy, *_origins(run)):
            # The manifest is deleted first: a half-deleted folder must not look complete.
            (folder / MANIFEST).unlink()
            shutil.rmtree(folder)
    _prune_set_aside(newest.parent, healthy or kept[-1])


def _origins(run: RunSettings) -> set[Path]:
    """What the run's model was grown from, and its teacher. In a run that grows, both may be checkpoints of its own."""
    source = run.model.initialize_from
    named = (
        source.source if isinstance(source, GrowthStart) else source,
        run.distillation and run.distillation.teacher,
    )
    return {Path(folder) for folder in named if folder}


def _prune_set_aside(folder: Path, oldest: Path) -> None:
    """Delete folders that were set aside before the ``oldest`` checkpoint that is kept."""
    for path in folder.iterdir():
        match = _SET_ASIDE.fullmatch(path.name)
        if match and f"step_{match[1]}" < oldest.name:
            shutil.rmtree(path)
