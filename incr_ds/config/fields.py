"""Reading of settings files: strict types, no unknown key, every mistake reported at once with its key path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from incr_ds.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings section: frozen, strictly typed, unknown keys and numbers that are not finite refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


SettingsType = TypeVar("SettingsType", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML with 1.2 floats (1e-3 is a number) and no silently repeated key."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _mapping_without_repeats(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            line = key_node.start_mark.line + 1
            raise ConfigError(f"{loader.name}, line {line}: key {key!r} appears twice; keep one of the two.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_repeats)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; raise ConfigError naming file and line if it is not one."""
    try:
        with open(path, encoding="utf-8") as stream:
            content = yaml.load(stream, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({why}); expected a YAML settings file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top, found {type(content).__name__}.")
    return content


def load_settings(
    path: Path | Sequence[Path], kind: type[SettingsType], overrides: list[str] | None = None
) -> SettingsType:
    """Read ``path``, apply ``a.b=value`` overrides (values are YAML), and validate against ``kind``.

    Of several files the later ones win, section by section. Raises ConfigError that lists every mistake with its key path,
    and near names for unknown keys.
    """
    paths = [path] if isinstance(path, Path) else path
    content: dict[str, Any] = {}
    for file in paths:
        content = merged(content, read_yaml(file))
    for override in overrides or []:
        _apply_override(content, override)
    return parse_settings(content, kind, " + ".join(map(str, paths)))


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, section by section."""
    joined = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            joined[key] = merged(below[key], above[key])
    return joined


def parse_settings(content: dict[str, Any], kind: type[SettingsType], where: str) -> SettingsType:
    """Validate ``content`` against ``kind``; ``where`` names its origin in the error."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        lines = [_describe(problem, kind) for problem in error.errors()]
        raise ConfigError("\n".join([f"{where}: {len(lines)} problem(s)", *lines])) from error


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
    section[leaf] = yaml.load(text, Loader=_Loader)


def _describe(problem: Any, kind: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"]) or "(top level)"
    if problem["type"] == "extra_forbidden":
        return f"  {key}: unknown key{_near_names(problem['loc'], kind)}"
    found = problem.get("input")
    shown = "" if problem["type"] == "missing" or isinstance(found, dict | list) else f", found {found!r}"
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
