"""Checks DeepSpeed's JSON file without importing DeepSpeed, which ignores unknown keys."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from incr_ds.config.fields import MOST_PROBLEMS
from incr_ds.config.json_file import read_json
from incr_ds.config.yaml_file import read_yaml
from incr_ds.errors import ConfigError


def read_deepspeed_file(path: Path) -> Mapping[str, Any]:
    """Read a DeepSpeed JSON file.

    Raises ConfigError that lists every key that DeepSpeed does not know and every value of the wrong type.
    """
    content = read_json(path, ConfigError, "; the run file names it as deepspeed.")
    problems = list(_misfits(content, known_keys()))
    if problems:
        raise ConfigError("\n".join([f"{path}: {len(problems)} problem(s)", *problems[:MOST_PROBLEMS]]))
    return content


@cache
def known_keys() -> Mapping[str, Any]:
    """The type of value that each key takes, from deepspeed_keys.yaml."""
    return read_yaml(Path(__file__).with_name("deepspeed_keys.yaml"))


def _misfits(section: Mapping[str, Any], known: Mapping[str, Any], at: str = "") -> Iterator[str]:
    """Keys that DeepSpeed would ignore, and values that it would refuse only after the slow imports."""
    for key, value in section.items():
        kind = known.get(key)
        if kind is None:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"  {at}{key:.80}: not a DeepSpeed key{hint}"
        elif isinstance(kind, Mapping):
            # An offload section may be null.
            if isinstance(value, Mapping):
                yield from _misfits(value, kind, f"{at}{key}.")
            elif value is not None:
                yield f"  {at}{key}: expected a section of DeepSpeed's config, found {value!r:.80}"
        elif not _KINDS[kind](value):
            yield f"  {at}{key}: expected {_EXPECTED[kind]}, found {value!r:.80}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "count": lambda value: _is_number(value) and value >= 0 and value == int(value),
    "number": _is_number,
    "flag": lambda value: value is None or isinstance(value, bool),
    "text": lambda value: value is None or isinstance(value, str),
    "section": lambda value: isinstance(value, dict),
}
_EXPECTED = {
    "count": "a whole number",
    "number": "a number",
    "flag": "true or false",
    "text": "text",
    "section": "a section of DeepSpeed's config",
}
