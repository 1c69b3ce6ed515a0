"""A run's checkpoints: each a DeepSpeed folder that appears whole, with a manifest, or not at all.

    <run.output>/checkpoints/step_00000100/
        global_step100/   what DeepSpeed saved, all ranks
        latest            global_step100
        config.json       the model, so that growth and evaluation can open the folder; tokenizer files if known
        optimizer_groups.json   AdamW multipliers of single tensors, where the run has them
        manifest.json     size and checksum of every file; layout, step, data fingerprints and settings

All ranks must call ``save_checkpoint``, ``newest_complete`` and ``load_checkpoint``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.dynamics import FILE as DYNAMICS_FILE
from incr_ds.arch.dynamics import Dynamics, dynamics_text
from incr_ds.config.training import RunSettings
from incr_ds.errors import CheckpointError, ConfigError, LayoutError
from incr_ds.grow import TOKENIZER_FILES
from incr_ds.target.commit import MANIFEST, publish, read_manifest, verify_manifest
from incr_ds.target.huggingface import config_text
from incr_ds.train.metrics import Position
from incr_ds.train.ranks import on_every_rank, on_rank_zero

KIND = "deepspeed training checkpoint"
FOLDER = "checkpoints"
# Settings that decide which parameter groups the optimizer's state has, and what they are in checkpoints that lack them.
GROUPING: Mapping[str, Any] = {"optimizer.multipliers": "checkpoint", "model.freeze": []}


class SavingEngine(Protocol):
    """The part of the training engine that checkpoints need."""

    def save(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        """Every rank writes its files below folder/tag."""
        ...

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        """Load folder/tag and return its client_state."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What a run needs besides model and optimizer to go on as if it had not stopped.

    ``evaluated_step`` is the last step with a held-out evaluation (-1: none), ``data`` the fingerprint per data set.
    """

    position: Position
    evaluated_step: int
    data: Mapping[str, str]
    settings: Mapping[str, Any]


def save_checkpoint(
    engine: SavingEngine,
    run: RunSettings,
    architecture: Architecture,
    state: TrainingState,
    dynamics: Mapping[str, Dynamics] | None = None,
) -> Path:
    """Save at ``state``'s step, publish when every rank has written, then delete what ``keep_last`` does not keep.

    ``dynamics`` are the multipliers that the engine was built with.

    Raises CheckpointError on all ranks if any rank could not write; the folder then does not appear.
    """
    final = step_folder(run, state.position.step)
    tag = f"global_step{state.position.step}"
    client_state = asdict(state)
    with ExitStack() as stack:
        facts = {"layout": run.layout.model_dump(), "tag": tag, **client_state}
        folder = on_rank_zero(lambda: stack.enter_context(publish(_vacated(final), KIND, facts)))
        remedy = "Nothing was published; check space and permissions."
        on_every_rank(lambda: engine.save(folder, tag, client_state), f"{final}: saving failed", remedy)
        on_rank_zero(lambda: _write_companions(folder, tag, run, architecture, dynamics))
        on_rank_zero(stack.close)  # publishes; the others wait here until the folder is there
    on_rank_zero(lambda: _prune(run, final))
    return final


def newest_complete(run: RunSettings, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of the run whose manifest verifies, or None if the run has none.

    Damaged ones are reported through ``say`` and skipped; CheckpointError if there are only such.
    """
    return on_rank_zero(lambda: _newest_complete(run, say))


def load_checkpoint(engine: SavingEngine, run: RunSettings, folder: Path, data: Mapping[str, str]) -> TrainingState:
    """Load the run's own checkpoint; refuse one of another layout, data, seed or batch."""
    facts = on_rank_zero(lambda: read_manifest(folder)["facts"])
    check_layout_matches(folder, facts["layout"], run)
    _check_same_run(folder, facts, run, data)
    _check_same_groups(folder, facts, run)
    client_state = engine.load(folder, facts["tag"])
    return TrainingState(
        position=Position(**client_state["position"]),
        evaluated_step=client_state["evaluated_step"],
        data=client_state["data"],
        settings=client_state["settings"],
    )


def check_layout_matches(folder: Path, found: Mapping[str, int], run: RunSettings) -> None:
    """Raise LayoutError naming the degrees in which a DeepSpeed checkpoint's layout differs from ``run.layout``."""
    wanted = run.layout.model_dump()
    different = [
        f"{name} {found.get(name)} (this run: {value})" for name, value in wanted.items() if found.get(name) != value
    ]
    if different:
        raise LayoutError(
            f"{folder}: laid out for {', '.join(different)}; optimizer state fits its own layout only. Run with that "
            "layout, grow the checkpoint into this one (tools/grow_checkpoint.py, key layout), or start from its weights "
            "alone: model.initialize_from with model.load_optimizer: false."
        )


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every setting that differs."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changed_settings(before, after, f"{path}{key}.")
        elif before != after:
            lines.append(f"{path}{key}: {before} -> {after}")
    return lines


def step_folder(run: RunSettings, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return Path(run.output) / FOLDER / f"step_{step:08d}"


def _vacated(final: Path) -> Path:
    """``final``, free to be published: an earlier, damaged folder of that step is kept under another name."""
    if final.exists():
        number = 1
        while (aside := final.with_name(f"damaged_{final.name}.{number}")).exists():
            number += 1
        final.rename(aside)
    return final


def _write_companions(
    folder: Path, tag: str, run: RunSettings, architecture: Architecture, dynamics: Mapping[str, Dynamics] | None
) -> None:
    (folder / "latest").write_text(tag, encoding="utf-8")
    if dynamics:
        (folder / DYNAMICS_FILE).write_text(dynamics_text(dynamics), encoding="utf-8")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[run.precision]
    (folder / "config.json").write_text(config_text(architecture, dtype), encoding="utf-8")
    if run.data.tokenizer is not None:
        for name in TOKENIZER_FILES:
            if (Path(run.data.tokenizer) / name).is_file():
                shutil.copyfile(Path(run.data.tokenizer) / name, folder / name)


def _step_folders(run: RunSettings) -> list[Path]:
    return sorted((Path(run.output) / FOLDER).glob("step_*"), reverse=True)


def _newest_complete(run: RunSettings, say: Callable[[str], None]) -> Path | None:
    problems = []
    for folder in _step_folders(run):
        try:
            verify_manifest(folder)
        except CheckpointError as error:
            problems.append(str(error))
            say(f"skipped a damaged checkpoint: {error}")
        else:
            return folder
    if problems:
        raise CheckpointError(
            f"{run.output}: no checkpoint of this run is whole, so it cannot resume; remove {FOLDER}/ to start over.\n  "
            + "\n  ".join(problems)
        )
    return None


def _prune(run: RunSettings, newest: Path) -> None:
    if run.checkpoint.keep_last:
        # A later folder can only be a damaged one that resuming skipped; it must not push out a whole one.
        complete = [item for item in _step_folders(run) if (item / MANIFEST).is_file() and item.name <= newest.name]
        for folder in complete[run.checkpoint.keep_last :]:
            # The manifest goes first: a folder that is half deleted must not look complete.
            (folder / MANIFEST).unlink()
            shutil.rmtree(folder)


def _check_same_run(folder: Path, facts: Mapping[str, Any], run: RunSettings, data: Mapping[str, str]) -> None:
    old, new = facts["settings"], run.model_dump(mode="json")
    problems = [f"data {name}: changed since" for name in data if facts["data"].get(name) not in (None, data[name])]
    problems += [f"data {name}: not part of it" for name in data if name not in facts["data"]]
    for key in ("seed", "batch.sequence_length", "batch.global_batch_size", "data.train", "data.start_sample"):
        before, after = _at(old, key), _at(new, key)
        if before != after:
            problems.append(f"{key}: {before} there, {after} in this run file")
    if problems:
        raise ConfigError(
            f"{folder}: resuming would not continue the same order of tokens:\n  " + "\n  ".join(problems) + "\n"
            "Restore them, or start another run: another output, with model.initialize_from this checkpoint."
        )


def _check_same_groups(folder: Path, facts: Mapping[str, Any], run: RunSettings) -> None:
    """The optimizer's state is laid out by parameter group, so what forms the groups must be as it was."""
    old, new = facts["settings"], run.model_dump(mode="json")
    changed = {key: (_at(old, key, missing), _at(new, key)) for key, missing in GROUPING.items()}
    problems = [f"{key}: {old} there, {new} in this run file" for key, (old, new) in changed.items() if old != new]
    if problems:
        raise ConfigError(
            f"{folder}: its optimizer state is that of other parameter groups:\n  " + "\n  ".join(problems) + "\n"
            "Restore them, or start another run: another output, with model.initialize_from this checkpoint."
        )


def _at(settings: Mapping[str, Any], key: str, missing: Any = None) -> Any:
    """The value of a dotted key; ``missing`` where a checkpoint is older than the key."""
    value: Any = settings
    for name in key.split("."):
        value = value.get(name, missing)
    return value
