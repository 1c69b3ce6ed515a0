"""Reads YAML settings as plain values: mappings, lists, text, numbers, true and false.

No tag creates anything else, and nothing is guessed: dates, yes and no, and numbers with a leading 0 or a colon are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from incr_ds.config.json_file import DEEPEST, read_text
from incr_ds.errors import ConfigError

_MOST_VALUES = 1 << 22  # after references are expanded; a fitted recipe of a large model has a million numbers
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema. Duplicate keys are errors."""


_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    None: yaml.SafeLoader.construct_undefined,
    **{
        _TAG + kind: yaml.SafeLoader.yaml_constructors[_TAG + kind]
        for kind in ("null", "bool", "int", "float", "str", "seq")
    },
}


for _kind, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?|[-+]?\d[\d_]*[eE][-+]?\d+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"^(?:{_pattern})$"), _first)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{loader.name}, line {line}: a key that is a list or a mapping: expected a name.")
        key = loader.construct_object(key_node)
        if not isinstance(key, str | int) or isinstance(key, bool):
            raise ConfigError(f"{loader.name}, line {line}: key {key!r:.80}: expected a name; put it in quotes.")
        if key in seen:
            raise ConfigError(f"{loader.name}, line {line}: key {key!r:.80} appears twice; keep one of the two.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises ConfigError that names file and line if it is not one."""
    content = parse_yaml(read_text(path, ConfigError, "; expected a YAML settings file."), str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys at the top, found {type(content).__name__}.")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text into plain values. Raises ConfigError that names ``where`` and the line for anything else."""
    loader = None
    try:
        loader = _Loader(text)
        loader.name = where
        content = loader.get_single_data()
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{where}: not valid YAML here: nested more than {DEEPEST} levels deep.") from error
    except Exception as error:  # PyYAML's constructors raise many kinds of errors for text that does not match its tag
        raise ConfigError(f"{where}: not valid YAML: {error or type(error).__name__}") from error
    _check_plain(content, where)
    return content


def _check_plain(content: Any, where: str) -> None:
    """Raise ConfigError for numbers that are not finite, text with a NUL, and more levels or values than settings have."""
    if _expanded(content, {}, where) > _MOST_VALUES:
        raise ConfigError(f"{where}: not a settings file: more than {_MOST_VALUES:,} values.")
    waiting = [(content, where, 0)]
    while waiting:
        value, at, depth = waiting.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{at}: {value}: expected a finite number.")
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(f"{at}: {value!r:.80}: text must not contain a NUL character.")
        if isinstance(value, dict | list):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += (
                (inner, f"{at}: {key!s:.80}" if depth == 0 else f"{at}.{key!s:.80}", depth + 1) for key, inner in items
            )


def _expanded(value: Any, known: dict[int, int], where: str, depth: int = 0) -> int:
    """How many values there are once references are expanded. A container that is referenced often is counted once."""
    if depth > DEEPEST:
        raise ConfigError(f"{where}: not a settings file: more than {DEEPEST} levels deep.")
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(one, known, where, depth + 1) for one in inner)
    return known[id(value)]


class _Dumper(yaml.SafeDumper):
    """Puts quotes around text that read_yaml, or a YAML 1.1 reader, would read as another type."""


for _first_letter, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _tag, _regexp in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _regexp, [_first_letter])


def yaml_text(content: Mapping[str, Any]) -> str:
    """Format plain values as YAML that ``read_yaml`` reads back unchanged, with keys in their order."""
    return str(yaml.dump(dict(content), Dumper=_Dumper, sort_keys=False))
