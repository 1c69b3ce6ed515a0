"""Checks whether a run file continues the run that wrote a checkpoint: what must be the same, and what may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from incr_ds.arch.architecture import Architecture, saved_architecture
from incr_ds.checkpoint.companions import TOKENIZER_FILES
from incr_ds.config.json_file import regular_bytes
from incr_ds.config.layout import ParallelLayout
from incr_ds.config.training import RunSettings
from incr_ds.errors import ConfigError, LayoutError

# Settings that must be the same, by the effect of a change, each with its value in checkpoints that lack the key.
TOKENS = "resuming would not continue the same order of tokens"
GROUPS = "its optimizer state is that of other parameter groups"
MODEL = "it holds another model, or holds it in another precision"
FIXED: Mapping[str, Mapping[str, Any]] = {
    TOKENS: dict.fromkeys(("seed", "batch.sequence_length", "batch.global_batch_size", "data.start_sample"), None)
    | {"schedule.start_step": 0, "batch.ramp": []},
    GROUPS: {"optimizer.name": "adamw", "optimizer.multipliers": "checkpoint", "model.freeze": []},
    MODEL: {"precision": None},
}


def stage_in(folder: Path, facts: Mapping[str, Any], run: RunSettings) -> int:
    """The stage of ``run`` that its checkpoint ``folder``, whose manifest holds ``facts``, is in.

    Growths that have happened must be those of the run file: their steps and recipes. Raises ConfigError that lists those
    that are not, and growths that the run has passed without them.
    """
    position = facts["position"]
    stage, step = int(position.get("stage", 0)), int(position["step"])
    then, now = facts["settings"].get("growth", [])[:stage], run.model_dump(mode="json")["growth"]
    problems = [
        f"growth.{number}.{key}: {was[key]} there, {now[number][key] if number < len(now) else 'none'} in this run file"
        for number, was in enumerate(then)
        for key in ("at_step", "recipe")
        if number >= len(now) or now[number][key] != was[key]
    ]
    problems += [
        f"growth.{number}.at_step: {growth['at_step']}, but the run took {step} steps without it"
        for number, growth in enumerate(now[stage:], start=stage)
        if growth["at_step"] < step
    ]
    if problems:
        raise ConfigError(
            f"{folder}: the run has grown otherwise:\n  " + "\n  ".join(problems) + "\n"
            "Restore the section growth, or start a new run: another output, with model.initialize_from this checkpoint and "
            f"schedule.start_step {step}."
        )
    return stage


def check_continues(
    folder: Path,
    facts: Mapping[str, Any],
    run: RunSettings,
    data: Mapping[str, str],
    architecture: Architecture,
    layout: ParallelLayout,
) -> None:
    """Raise an error if the run cannot resume from the checkpoint ``folder``, whose manifest holds ``facts``.

    It cannot with another model, tokenizer or precision, with other data without ``run.resume.change_data``, nor in another
    layout without ``run.resume.reshard``. Data is the same if its content and weights are, wherever its files are.
    ``data`` is the fingerprint of each data set. ``architecture`` and ``layout`` are those of the stage in which the run
    resumes. Raises LayoutError or ConfigError that lists every difference.
    """
    if not run.resume.reshard:
        check_layout_matches(folder, facts["layout"], layout)
    old, new = facts["settings"], run.model_dump(mode="json")
    problems = {heading: list(_changed(old, new, fixed)) for heading, fixed in FIXED.items()}
    other_data = [] if run.resume.change_data else list(_other_data(facts, run, data))
    problems[TOKENS][:0] = other_data
    problems[GROUPS] += _other_groups(old, new)
    remedy = " With resume.change_data: true, the run reads other data from here on." if other_data else ""
    problems[TOKENS] += _other_tokenizer(folder, run)
    problems[MODEL][:0] = _other_fields(folder, architecture)
    if any(problems.values()):
        found = [f"{folder}: {heading}:\n  " + "\n  ".join(lines) for heading, lines in problems.items() if lines]
        raise ConfigError(
            "\n".join(found) + "\n"
            "Restore them, or start a new run: another output, with model.initialize_from this checkpoint." + remedy
        )


def check_layout_matches(folder: Path, found: Mapping[str, int], layout: ParallelLayout) -> None:
    """Raise LayoutError that names the degrees in which a DeepSpeed checkpoint's layout differs from the run's ``layout``.

    A run without resume.reshard loads DeepSpeed's files as they are, which works only in their own layout.
    """
    known = {name: found.get(name) for name in layout.model_dump() if name != "stages"}
    known["stages"] = _as_tuple(found.get("stages", "even"))  # checkpoints that are older than the key have even stages
    different = [
        f"{name} {known[name]} (this run: {value})"
        for name, value in layout.model_dump().items()
        if known[name] != value
    ]
    if different:
        raise LayoutError(
            f"{folder}: laid out for {', '.join(different)}; its files are loaded as they are only in their own layout. Set "
            "resume.reshard: true, with which each rank reads its own slices of them, run with that layout, grow the checkpoint "
            "into this one (tools/grow_checkpoint.py, key layout), or start from its weights alone: model.initialize_from with "
            "model.load_optimizer: false."
        )


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every setting that differs."""
    lines = []
    for key in sorted({*old, *new}):
        before, after = _as_section(old.get(key)), _as_section(new.get(key))
        if isinstance(before, dict) and isinstance(after, dict):
            lines += changed_settings(before, after, f"{path}{key}.")
        elif before != after:
            lines.append(f"{path}{key}: {before} -> {after}")
    return lines


def _as_section(value: Any) -> Any:
    """A list of sections as a section, with its numbers as keys; other values as they are."""
    sections = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    return {str(number): item for number, item in enumerate(value)} if sections else value


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], fixed: Mapping[str, Any]) -> Iterator[str]:
    for key, missing in fixed.items():
        before, after = _at(old, key, missing), _at(new, key)
        if before != after:
            yield f"{key}: {before} there, {after} in this run file"


def _other_groups(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """With optimizer.new_parameters, new layers have groups of their own. Its rate and warm-up may change, its presence not."""
    key = "new_parameters"
    before, after = (settings["optimizer"].get(key) is not None for settings in (old, new))
    if before != after:
        yield f"optimizer.{key}: {'set' if before else 'not set'} there, {'set' if after else 'not set'} in this run file"


def _other_data(facts: Mapping[str, Any], run: RunSettings, data: Mapping[str, str]) -> Iterator[str]:
    """Data sets with other content than the checkpoint's. One that was moved, with its content, is the same."""
    old = facts["data"]
    before = facts["settings"]["data"]["train"]
    after = [corpus.model_dump(mode="json") for corpus in run.data.train]
    same_mix = _mix(before, old) == _mix(after, data)
    trained = {corpus.prefix for corpus in run.data.train} if same_mix else set()
    for prefix, fingerprint in data.items():
        if prefix in trained:
            continue
        if prefix in old and old[prefix] != fingerprint:
            yield f"data {prefix}: changed since"
        elif fingerprint not in old.values():
            yield f"data {prefix}: not part of it"
    if not same_mix and before != after:
        yield f"data.train: {before} there, {after} in this run file"


def _mix(corpora: Sequence[Mapping[str, Any]], fingerprints: Mapping[str, str]) -> list[tuple[str | None, float]]:
    """Content and weight of each corpus, in the order of the run file, which the order of samples depends on."""
    return [(fingerprints.get(corpus["prefix"]), corpus["weight"]) for corpus in corpora]


def _other_tokenizer(folder: Path, run: RunSettings) -> Iterator[str]:
    """Compare the tokenizer's files with the copies in the checkpoint."""
    if run.data.tokenizer is None:
        return
    for name in TOKENIZER_FILES:
        now, then = Path(run.data.tokenizer) / name, folder / name
        if then.is_file() and (not now.is_file() or _content(now) != _content(then)):
            yield f"data.tokenizer {now}: changed since"


def _content(path: Path) -> bytes:
    return regular_bytes(path, path.stat().st_size)


def _other_fields(folder: Path, architecture: Architecture) -> Iterator[str]:
    old, new = saved_architecture(folder / "config.json"), architecture
    if old.family != new.family:
        yield f"model_type: {old.family.model_type} there, {new.family.model_type} in this run"
        return
    for key in sorted(new.family.effective_fields):
        before, after = old.config.get(key), new.config.get(key)
        if before != after:
            yield f"model config {key}: {before} there, {after} in this run"


def _at(settings: Mapping[str, Any], key: str, missing: Any = None) -> Any:
    """The value of a dotted key, or ``missing`` if the checkpoint is older than the key."""
    value: Any = settings
    for name in key.split("."):
        value = value.get(name, missing)
    return value
