"""Which tensors a run freezes: patterns of names with the rules of .gitignore."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from incr_ds.arch.architecture import Architecture
from incr_ds.errors import ConfigError

KEY = "model.freeze"


def frozen_tensors(architecture: Architecture, patterns: Sequence[str]) -> frozenset[str]:
    """Names of the stored tensors that ``patterns`` freeze.

    A tensor is frozen if the last pattern that matches its name does not begin with ``!``. * stands for any characters,
    including dots. Raises ConfigError for a pattern without effect (it matches no tensor or, with ``!``, no frozen one)
    and if nothing is left to train.
    """
    names = [spec.name for spec in architecture.stored]
    frozen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern.removeprefix("!"))}
        if pattern.startswith("!"):
            _check_frees(pattern, found, frozen)
            frozen -= found
        elif not found:
            raise ConfigError(f"{KEY}: {pattern!r} matches no tensor; {_hint(architecture, pattern)}")
        else:
            frozen |= found
    if len(frozen) == len(names):
        raise ConfigError(
            f"{KEY}: {', '.join(map(repr, patterns))} freeze all {len(names)} tensors, so nothing would train; add what "
            f"trains with '!' before it, like '!{names[-1]}'."
        )
    return frozenset(frozen)


def _check_frees(pattern: str, found: set[str], frozen: set[str]) -> None:
    if not found & frozen:
        raise ConfigError(
            f"{KEY}: {pattern!r} matches no tensor that an earlier pattern freezes; put it after that pattern, or remove it."
        )


def _hint(architecture: Architecture, pattern: str) -> str:
    aliases = [spec for spec in architecture.tensors if spec.tied_to and fnmatchcase(spec.name, pattern)]
    if aliases:
        return f"{aliases[0].name} is tied to {aliases[0].tied_to} here (tie_word_embeddings): use that name."
    shown = ", ".join(spec.name for spec in (*architecture.stored[:2], architecture.stored[-1]))
    return f"names are those of the Hugging Face model, like {shown}."
