"""Finds which config fields the installed transformers reads for a model. It parses source text and imports none of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Code that every model uses besides its own two files. Generation is not among them: it changes no logits.
SHARED_CONFIG = ("configuration_utils.py", "modeling_rope_utils.py", "utils/generic.py", "integrations/heterogeneity")
SHARED_MODEL = (
    "modeling_utils.py",
    "modeling_layers.py",
    "modeling_flash_attention_utils.py",
    "masking_utils.py",
    "cache_utils.py",
    "core_model_loading.py",
    "initialization.py",
    "monkey_patching.py",
    "loss/loss_utils.py",
    "utils/output_capturing.py",
    "integrations/sdpa_attention.py",
    "integrations/flash_attention.py",
    "integrations/flex_attention.py",
    "integrations/moe.py",
)
_ANY = object()  # stands for "no default"


@dataclass(frozen=True)
class Read:
    """A place that reads a field: the file, whether it is the model's own, and the default for an absent field, if any."""

    file: str
    is_own: bool
    default: Any = _ANY


def installed_version() -> str:
    """The installed release of transformers, for which the answers hold."""
    return version("transformers")


def changes_nothing(field: str, value: Any, module: str) -> bool:
    """Whether a model in transformers' folder ``module`` computes the same with and without ``field`` at ``value``.

    That is so if its code does not read the field, or if ``value`` is the default for a missing one.
    """
    defaults = [read.default for read in reads_of(field, module)]
    # Shared code reads fields that most models lack. Without a default, it tests for null before it uses them.
    own = any(read.is_own for read in reads_of(field, module))
    optional = [default for default in defaults if default is not _ANY] if value is None and not own else defaults
    return all(default is not _ANY and default == value and type(default) is type(value) for default in optional)


@cache
def reads_of(field: str, module: str) -> tuple[Read, ...]:
    """Every place that may read ``field`` of a config. It rather lists too many than too few.

    In config classes, and in code that iterates over lists of fields, every mention counts: a declaration, an attribute
    of self, a string. In models, it is an attribute of a variable called config, or a name passed to getattr and the like.
    """
    found = []
    for path, is_config in _files(module):
        text, is_own = path.read_text(encoding="utf-8"), path.parent.name == module
        if field in text:  # few files contain the word, and parsing takes longer than everything else
            found += [Read(path.name, is_own, default) for default in _named(path, is_config).get(field, ())]
    return tuple(found)


def _files(module: str) -> Iterator[tuple[Path, bool]]:
    own = _root() / "models" / module
    for names, is_config in ((SHARED_CONFIG, True), (SHARED_MODEL, False)):
        for path in (_root() / name for name in names):
            yield from ((file, is_config) for file in (sorted(path.glob("*.py")) if path.is_dir() else [path]))
    yield from ((path, True) for path in sorted(own.glob("configuration_*.py")))
    yield from ((path, False) for path in sorted(own.glob("modeling_*.py")))


@cache
def _root() -> Path:
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None, "transformers is a requirement of this package"
    return Path(spec.origin).parent


@cache
def _named(path: Path, is_config: bool) -> Mapping[str, list[Any]]:
    """The defaults of every read in a module, by field name."""
    found: dict[str, list[Any]] = {}
    for name, default in _names(path.read_text(encoding="utf-8"), is_config):
        found.setdefault(name, []).append(default)
    return found


def _names(text: str, is_config: bool) -> Iterator[tuple[str, Any]]:
    """Field names that a module may read from a config, each with the default of the read."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and _is_config(node.value, is_config):
            yield node.attr, _ANY
        elif isinstance(node, ast.Subscript) and _is_config(node.value, is_config):
            yield from _constant(node.slice)
        elif isinstance(node, ast.Call):
            yield from _named_in_call(node, is_config)
        elif is_config and isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id, _ANY
        elif is_config and isinstance(node, ast.Constant):
            yield from _constant(node)


def _is_config(node: ast.expr, in_config: bool) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return "config" in name.lower() or (in_config and name == "self")


def _constant(node: ast.expr, default: Any = _ANY) -> Iterator[tuple[str, Any]]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value, default


def _named_in_call(node: ast.Call, is_config: bool) -> Iterator[tuple[str, Any]]:
    """Reads by getattr(config, "field", default), hasattr, and config.get("field")."""
    function, arguments = node.func, node.args
    if isinstance(function, ast.Name) and function.id in ("getattr", "hasattr", "setattr") and len(arguments) > 1:
        given = arguments[2] if function.id == "getattr" and len(arguments) > 2 else None
        yield from _constant(arguments[1], given.value if isinstance(given, ast.Constant) else _ANY)
    elif isinstance(function, ast.Attribute) and _is_config(function.value, is_config) and arguments:
        yield from _constant(arguments[0])
