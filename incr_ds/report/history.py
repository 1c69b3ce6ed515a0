"""What a training run left on disk: its metrics, its settings, its checkpoints' manifests, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import saved_architecture
from incr_ds.checkpoint.provenance import Link, provenance, provenance_of_settings
from incr_ds.checkpoint.publish import read_manifest, write_atomically
from incr_ds.checkpoint.runs import CHECKPOINTS, step_folders
from incr_ds.config.yaml_file import read_yaml, yaml_text
from incr_ds.errors import CheckpointError, ConfigError, IncrError
from incr_ds.train.metrics import FILE, KINDS, EvaluationRow, GrowthRow, RollBackRow, TrainRow, read_damaged_metrics

SETTINGS, END = "resolved_run.yaml", "end.yaml"
MOST_STEPS = 1 << 53  # a larger number is not a step
VALIDATION = "validation_loss/"  # the beginning of the key of one validation set's loss


@dataclass(frozen=True)
class History:
    """One run. ``settings`` are its run file with every default (empty: not known), ``versions`` those of its last save.

    ``model`` is the family and the parameters of the newest checkpoint (None: there is no checkpoint), and ``chain`` where it
    comes from, the newest first. ``end`` says how the run's last start ended (None: it has not, or was killed).
    ``problems`` are what could not be read.
    """

    name: str
    folder: Path
    rows: tuple[Mapping[str, Any], ...]
    model: tuple[str, int] | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    data: Mapping[str, str]
    chain: tuple[Link, ...]
    end: str | None
    diverged: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def trained(self) -> list[Mapping[str, Any]]:
        """Rows of training steps."""
        return self._of(TrainRow)

    @property
    def evaluated(self) -> list[Mapping[str, Any]]:
        """Rows of held-out evaluations."""
        return self._of(EvaluationRow)

    @property
    def grown(self) -> list[Mapping[str, Any]]:
        """Rows of growths."""
        return self._of(GrowthRow)

    @property
    def rolled_back(self) -> list[Mapping[str, Any]]:
        """Rows of roll-backs."""
        return self._of(RollBackRow)

    @property
    def domains(self) -> list[str]:
        """Keys of the held-out losses: ``loss``, then one of each named validation set."""
        keys = dict.fromkeys(key for row in self.evaluated for key in row if key.startswith(VALIDATION))
        return ["loss", *keys] if self.evaluated else []

    @property
    def last_step(self) -> int | None:
        """The step at which the run is to end, if its settings state it."""
        schedule = self.settings.get("schedule")
        if not isinstance(schedule, Mapping):
            return None
        stated = schedule.get("end_step") or schedule.get("train_steps")
        return stated if isinstance(stated, int) else None

    def _of(self, kind: type) -> list[Mapping[str, Any]]:
        return [row for row in self.rows if row["kind"] == KINDS[kind]]


def read_history(folder: Path, name: str) -> History:
    """Read the run in ``folder``. Raises CheckpointError if it is not a run's output folder, or holds several runs."""
    path = folder / FILE
    if not path.exists():
        raise CheckpointError(f"{folder}: no {FILE}; expected the output folder of a training run (run.output).")
    rows, problems = read_damaged_metrics(path)
    if runs := sorted({str(row["run"]) for row in rows if "run" in row}):
        raise CheckpointError(
            f"{path}: rows of {len(runs)} runs ({', '.join(runs)[:200]}), merged by a study; name the folders of the runs."
        )
    kept = [_with_sets(row) for row in rows if 0 <= row["step"] < MOST_STEPS]
    if len(kept) < len(rows):
        problems.append(f"{path}: {len(rows) - len(kept)} rows whose step is not possible")
    newest, manifest = _newest_manifest(folder, problems)
    facts = manifest.get("facts", {})
    settings = _read(folder / SETTINGS, problems) or facts.get("settings", {})
    end = _read(folder / END, problems).get("end")
    return History(
        name=name,
        folder=folder,
        rows=tuple(kept),
        model=None if newest is None else _model(newest, problems),
        settings=settings,
        versions=manifest.get("versions", {}),
        data={str(key): str(value) for key, value in facts.get("data", {}).items()},
        chain=provenance_of_settings(settings) if newest is None else provenance(newest),
        end=None if end is None else str(end),
        diverged=tuple(sorted(item.name for item in (folder / CHECKPOINTS).glob("diverged_step_*"))),
        problems=tuple(problems),
    )


def note_start(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep a run's ``settings`` in its output ``folder``, and forget how it ended before."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / END).unlink(missing_ok=True)
    write_atomically(folder / SETTINGS, yaml_text(settings))


def note_end(folder: Path, end: str) -> None:
    """Keep how a run ended."""
    write_atomically(folder / END, yaml_text({"end": end}))


def number(row: Mapping[str, Any], key: str) -> float | None:
    """The value of ``key`` as a finite number, or None. Rows come from a file that others may have written."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def numbers(rows: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """The finite values of ``key``, in order."""
    return [value for row in rows if (value := number(row, key)) is not None]


def set_name(key: str) -> str:
    """What a reader calls the held-out loss ``key``: the set's name, or held-out for that of the whole evaluation."""
    return key.removeprefix(VALIDATION) if key.startswith(VALIDATION) else "held-out"


def names_of(folders: Iterable[Path]) -> dict[Path, str]:
    """A short name for each folder: its own, or its path where two have the same one."""
    given = list(folders)
    own = [folder.resolve().name for folder in given]
    return {folder: name if own.count(name) == 1 else str(folder) for folder, name in zip(given, own, strict=True)}


def _with_sets(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a key ``validation_loss/NAME`` for each named held-out set in its ``sets``."""
    sets = row.get("sets")
    found = sets.items() if isinstance(sets, dict) else ()
    return row | {f"{VALIDATION}{name}": item.get("loss") for name, item in found if isinstance(item, dict)}


def _newest_manifest(folder: Path, problems: list[str]) -> tuple[Path | None, Mapping[str, Any]]:
    for path in step_folders(folder):
        try:
            return path, read_manifest(path)
        except CheckpointError as error:
            problems.append(str(error))
    return None, {}


def _model(checkpoint: Path, problems: list[str]) -> tuple[str, int] | None:
    try:
        architecture = saved_architecture(checkpoint / "config.json")
    except IncrError as error:
        problems.append(str(error))
        return None
    return architecture.family.model_type, architecture.num_parameters


def _read(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return read_yaml(path)
    except ConfigError as error:
        problems.append(str(error))
        return {}
