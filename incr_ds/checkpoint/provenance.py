"""Where a model comes from: the chain of folders from a checkpoint back to the first source, by their manifests.

A link whose folder was moved or deleted ends the chain; what its successor recorded of it remains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.publish import MANIFEST, read_manifest
from incr_ds.errors import CheckpointError

LONGEST = 32  # links; a chain that is longer names itself


@dataclass(frozen=True)
class Link:
    """One folder of the chain. ``kind``, ``facts`` and ``versions`` are its manifest's; ``problem`` is why there is none."""

    folder: str
    kind: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def lines(self) -> list[str]:
        """What the manifest says of the way to this folder, a sentence each."""
        if self.problem is not None:
            return [self.problem]
        return [*_trained(self.facts), *_grown(self.facts), *_exported(self.facts)]


def provenance(folder: Path) -> tuple[Link, ...]:
    """The chain that ends in ``folder``, which comes first. A checkpoint of incr_ds has a manifest that names its origin."""
    return _chain(str(folder))


def provenance_of_settings(settings: Mapping[str, Any]) -> tuple[Link, ...]:
    """The chain of what a run with these ``settings`` (a run file's content) starts from; empty for fresh weights."""
    before = _origin_of_settings(settings)
    return _chain(before) if before else ()


def _chain(start: str) -> tuple[Link, ...]:
    links: list[Link] = []
    following: str | None = start
    while following and following not in {link.folder for link in links} and len(links) < LONGEST:
        links.append(_link(following))
        following = _origin(links[-1].facts)
    return tuple(links)


def _link(folder: str) -> Link:
    path = Path(folder)
    try:
        if not path.is_dir():
            return Link(folder, problem="not found from here")
        if not (path / MANIFEST).exists():
            return Link(folder, problem="without a manifest: incr_ds did not write it")
        content = read_manifest(path)
    except (CheckpointError, OSError, ValueError) as error:
        return Link(folder, problem=f"its manifest cannot be used: {error}")
    return Link(folder, content["kind"], content["facts"], content.get("versions", {}))


def _origin(facts: Mapping[str, Any]) -> str | None:
    source = facts.get("source")
    if isinstance(source, Mapping) and isinstance(source.get("folder"), str):  # a growth
        return str(source["folder"])
    if isinstance(facts.get("exported_from"), str):
        return str(facts["exported_from"])
    return _origin_of_settings(facts.get("settings"))


def _origin_of_settings(settings: Any) -> str | None:
    model = settings.get("model") if isinstance(settings, Mapping) else None
    origin = model.get("initialize_from") if isinstance(model, Mapping) else None
    if isinstance(origin, Mapping):
        origin = origin.get("source")
    return origin if isinstance(origin, str) else None


def _trained(facts: Mapping[str, Any]) -> list[str]:
    position, settings = facts.get("position"), facts.get("settings")
    if not isinstance(position, Mapping):
        return []
    grown = position.get("stage")
    times = f", grown {_number(grown)} time(s) on the way" if grown else ""
    lines = [
        f"trained to step {_number(position.get('step'))}: {_number(position.get('tokens'))} tokens, "
        f"{_number(position.get('flops'))} FLOPs in this run{times}"
    ]
    model = settings.get("model") if isinstance(settings, Mapping) else None
    if isinstance(model, Mapping):
        origin = model.get("initialize_from")
        if isinstance(origin, Mapping):
            lines.append(f"started as the growth of {origin.get('source')} by {origin.get('recipe')}")
        else:
            lines.append(f"started from {origin}" if origin else f"started from fresh weights of {model.get('config')}")
    return lines


def _grown(facts: Mapping[str, Any]) -> list[str]:
    source, target, recipe = facts.get("source"), facts.get("target"), facts.get("recipe")
    if not (isinstance(source, Mapping) and isinstance(target, Mapping) and isinstance(recipe, Mapping)):
        return []
    keeps = "keeps" if facts.get("function_preserving") else "does not keep"
    step = "" if source.get("step") is None else f" at step {_number(source['step'])}"
    line = (
        f"grown from {_number(source.get('parameters'))} to {_number(target.get('parameters'))} parameters, by a recipe that "
        f"{keeps} the function; the source is a {source.get('kind')}{step}"
    )
    notes = facts.get("notes")
    return [line, *(f"note: {note}" for note in (notes if isinstance(notes, list) else []))]


def _exported(facts: Mapping[str, Any]) -> list[str]:
    if not isinstance(facts.get("exported_from"), str):
        return []
    return [f"exported from {facts['exported_from']}, a {facts.get('source')}"]


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3e}"
    return f"{value:,}" if isinstance(value, int) else "an unknown number of"
