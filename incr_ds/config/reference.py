"""Writes the page of all keys of the run file from the classes that check them: docs/run_file_keys.md.

python -m incr_ds.config.reference > docs/run_file_keys.md
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from incr_ds.config.training import RunSettings

HEADING = """# All keys of the run file

<!-- Written by `python -m incr_ds.config.reference > docs/run_file_keys.md`; a test compares it. -->

Every key of a run file with its type, its default and its meaning. [run_file.md](run_file.md) explains how they work
together. A key without a default must be stated. Unknown keys are refused, with the most similar name.
"""
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_NAMES = {str: "text", int: "integer", float: "number", bool: "true or false"}


def page() -> str:
    """The page, as Markdown."""
    sections = list(_sections(RunSettings, "the run file"))
    return "\n".join([HEADING, *(line for title, kind in sections for line in _section(title, kind))]) + "\n"


def _sections(kind: type[BaseModel], title: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """``kind`` and every section below it, each once."""
    found = [(title, kind)]
    for above, section in found:
        for name, field in section.model_fields.items():
            path = name if section is kind else f"{above}.{name}"
            inner = [one for one in _models(field.annotation) if one not in [known for _, known in found]]
            found += [(path, one) for one in inner]
    yield from found


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _section(title: str, kind: type[BaseModel]) -> list[str]:
    about = textwrap.wrap(" ".join((kind.__doc__ or "").replace("``", "`").split()), 115)
    lines = [f"## {title}", "", *about, "", "| key | type | default | meaning |", "|---|---|---|---|"]
    return [*lines, *(_row(name, field) for name, field in kind.model_fields.items()), ""]


def _row(name: str, field: FieldInfo) -> str:
    return f"| `{name}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {field.description} |"


def _type(annotation: Any, metadata: list[Any]) -> str:
    bounds = [
        f" {sign} {_number(getattr(item, key))}"
        for item in metadata
        for key, sign in _BOUNDS.items()
        if hasattr(item, key)
    ]
    return f"{_name(annotation)}{','.join(bounds)}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [bound for item in arguments[1:] for bound in getattr(item, "metadata", [item])])
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_name(one) for one in arguments if one is not NoneType)
    if origin is list or (origin is tuple and arguments[1:] == (...,)):
        return f"list of {_name(arguments[0])}"
    if origin is tuple:
        return " and ".join(_name(one) for one in arguments)
    if origin is dict:
        return f"{_name(arguments[1])} by name"
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    return _NAMES[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "—"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "its keys' defaults"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


if __name__ == "__main__":
    sys.stdout.write(page())
