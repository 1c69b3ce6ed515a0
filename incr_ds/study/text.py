"""Text for a study from what is installed anyway: the source code of Python packages, and the prose of their docstrings.

constraints.txt fixes the versions, so the text is the same on every machine. A module gives two documents: its code with
every docstring cut out, and its docstrings. Equal documents count once. Text that is not ASCII is left out, since a small
vocabulary would be full of its characters.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import xxhash

from incr_ds.checkpoint.publish import write_atomically
from incr_ds.errors import ConfigError

KINDS = ("code", "prose")
SHORTEST = 200  # bytes of a document

_Documented: TypeAlias = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class TextFacts:
    """What was written to one file: its number of documents and bytes of text."""

    path: Path
    documents: int
    bytes: int


def write_texts(output: Path, max_bytes: int, packages: Path | None = None) -> tuple[TextFacts, ...]:
    """Write ``output``/code.jsonl and prose.jsonl (key text), each with at most ``max_bytes`` of text.

    ``packages`` is the folder whose .py files are read (None: this Python's site-packages). Files are taken in the order of a
    hash of their path, so a smaller ``max_bytes`` gives a sample of every package. Raises ConfigError if there is no text.
    """
    root = packages or Path(sysconfig.get_paths()["purelib"])
    texts: dict[str, list[str]] = {kind: [] for kind in KINDS}
    sizes, seen = dict.fromkeys(KINDS, 0), set()
    for source in _modules(root):
        for kind, text in zip(KINDS, code_and_prose(source), strict=True):
            size, digest = len(text.encode()), xxhash.xxh3_128_digest(text.encode())
            if text.isascii() and size >= SHORTEST and sizes[kind] + size <= max_bytes and digest not in seen:
                seen.add(digest)
                texts[kind].append(text)
                sizes[kind] += size
        if all(sizes[kind] + SHORTEST > max_bytes for kind in KINDS):
            break
    if empty := [kind for kind in KINDS if not texts[kind]]:
        raise ConfigError(
            f"{root}: no {' and no '.join(empty)} in .py files of at least {SHORTEST} bytes; name a folder with Python packages."
        )
    output.mkdir(parents=True, exist_ok=True)
    return tuple(_write(output / f"{kind}.jsonl", texts[kind], sizes[kind]) for kind in KINDS)


def code_and_prose(source: str) -> tuple[str, str]:
    """Split a module into its code without docstrings, and its docstrings. Two empty texts if it is not valid Python."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "", ""
    lines, prose = source.splitlines(keepends=True), []
    cut: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and (docstring := ast.get_docstring(node)):
            prose.append((node.body[0].lineno, docstring))
            cut.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    code = "".join(line for number, line in enumerate(lines, start=1) if number not in cut)
    return code, "\n\n".join(text for _, text in sorted(prose))


def _modules(root: Path) -> Iterator[str]:
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py") if path.is_file()}
    for _, path in sorted(paths.items(), key=lambda item: xxhash.xxh3_64_intdigest(item[0].encode())):
        try:
            yield path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue  # a few packages ship test files in other encodings


def _write(path: Path, texts: list[str], size: int) -> TextFacts:
    write_atomically(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextFacts(path, len(texts), size)
