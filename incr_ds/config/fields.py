"""Reads settings files with strict types and no unknown keys. All mistakes are reported at once, with key paths."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from incr_ds.config.yaml_file import parse_yaml, read_yaml
from incr_ds.errors import ConfigError

MOST_PROBLEMS = 20  # of a settings file that are reported at once: about one screen
# The range that both numpy and torch accept.
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


class Settings(BaseModel):
    """Base of every settings section. It is frozen and strictly typed; unknown keys, inf and nan are refused.

    The text below a key describes it, in the code and in the generated page of keys (config/reference.py).
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


SettingsType = TypeVar("SettingsType", bound=BaseModel)


def load_settings(
    path: Path | Sequence[Path], kind: type[SettingsType], overrides: list[str] | None = None
) -> SettingsType:
    """Read ``path``, apply ``a.b=value`` overrides (values are YAML), and validate against ``kind``.

    If there are several files, later ones override earlier ones section by section. Raises ConfigError that lists
    every mistake with its key path, and suggests a similar name for an unknown key.
    """
    paths = [path] if isinstance(path, Path) else path
    content: dict[str, Any] = {}
    for file in paths:
        content = merged(content, read_yaml(file))
    for override in overrides or []:
        _apply_override(content, override)
    return parse_settings(content, kind, " + ".join(map(str, paths)))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Merge two mappings section by section; ``above`` overrides ``below``."""
    joined = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            joined[key] = merged(below[key], above[key])
    return joined


def parse_settings(content: dict[str, Any], kind: type[SettingsType], where: str) -> SettingsType:
    """Validate ``content`` against ``kind``. Errors name ``where`` as its origin."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
        lines = [_describe(problem, kind) for problem in problems[:MOST_PROBLEMS]]
        more = [f"  and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise ConfigError("\n".join([f"{where}: {len(problems)} problem(s)", *lines, *more])) from error


def _apply_override(content: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override}: expected key.path=value.")
    *parents, leaf = path.split(".")
    section = content
    for name in parents:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {name} is a single value in the file, not a section.")
    section[leaf] = parse_yaml(text, f"--set {path}")


def _describe(problem: Any, kind: type[BaseModel]) -> str:
    key = ".".join(f"{part!s:.80}" for part in problem["loc"]) or "(top level)"
    if problem["type"] == "extra_forbidden":
        return f"  {key}: unknown key{_near_names(problem['loc'], kind)}"
    found = problem.get("input")
    shown = "" if problem["type"] == "missing" or isinstance(found, dict | list) else f", found {found!r:.80}"
    return f"  {key}: {problem['msg'].removeprefix('Value error, ')}{shown}"


def _near_names(location: tuple[Any, ...], kind: type[BaseModel]) -> str:
    section: Any = kind
    for part in location[:-1]:
        field = section.model_fields.get(part) if hasattr(section, "model_fields") else None
        section = (
            next((a for a in _annotation_parts(field.annotation) if hasattr(a, "model_fields")), None)
            if field
            else None
        )
    names = list(section.model_fields) if section is not None else []
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known keys: {', '.join(names)}" if names else ""


def _annotation_parts(annotation: Any) -> list[Any]:
    return [annotation, *getattr(annotation, "__args__", ())]
