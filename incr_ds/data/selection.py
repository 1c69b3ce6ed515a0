"""What to prepare: a request, and the input files that it selects, in reading order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import xxhash

from incr_ds.config.json_file import read_json
from incr_ds.errors import ConfigError

SPLITS = ("train", "validation")
TEXT = ("*.py", "*.txt", "*.md", "*.jsonl")
COMPRESSED = tuple(f"*{ending}{packed}" for ending in (".txt", ".jsonl", ".json") for packed in (".gz", ".zst"))
TABLES = ("*.parquet", "*.arrow")
# What datasets' save_to_disk writes beside the arrow files: of one data set, and of several under one folder.
_STATE, _DESCRIPTION, _SEVERAL = "state.json", "dataset_info.json", "dataset_dict.json"


@dataclass(frozen=True, kw_only=True)
class CorpusRequest:
    """What to prepare: input folders and files, and how to tokenize them.

    ``tokenizer`` is a folder, a tokenizer.json, a sentencepiece model or ``train:sentencepiece``. ``eos_token`` names the
    token that ends a document (None: the tokenizer's own). ``text_key`` is the key of .jsonl files, and the column of
    tables. ``held_out`` is the fraction of documents for validation, ``max_bytes`` bounds the bytes of the input files
    (None: all), and ``exclude`` names folders that are skipped. ``trust`` lets a tokenizer folder run its own code. The
    result does not depend on ``workers``, the number of processes that tokenize.
    """

    inputs: tuple[Path, ...]
    tokenizer: str
    output: Path
    vocabulary_size: int = 4096
    held_out: float = 0.05
    patterns: tuple[str, ...] = (*TEXT, *COMPRESSED, *TABLES)
    exclude: tuple[str, ...] = ("site-packages", "__pycache__", ".git", ".venv", "node_modules")
    text_key: str = "text"
    append_eos: bool = True
    eos_token: str | None = None
    max_bytes: int | None = None
    workers: int = 1
    overwrite: bool = False
    trust: bool = False


@dataclass(frozen=True)
class Selection:
    """Input files in reading order with their sizes in bytes, and what was left out because of ``max_bytes``."""

    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    left_out_files: int
    left_out_bytes: int

    @property
    def total_bytes(self) -> int:
        """Bytes of all files as they are on disk."""
        return sum(self.sizes)


def select_files(request: CorpusRequest) -> Selection:
    """Files of the request in path order. Beyond ``max_bytes``, only an even sample (by hash of the name) is kept."""
    found = [(root, path) for given in request.inputs for root, path in _walk(given, request)]
    if not found:
        raise ConfigError(
            f"--input {', '.join(map(str, request.inputs))}: no file matches --pattern {','.join(request.patterns)}; "
            f"folders named {', '.join(request.exclude)} are skipped."
        )
    sizes = {path: _size(path) for _, path in found}
    if request.max_bytes is None:
        return Selection(tuple(sizes), tuple(sizes.values()), 0, 0)
    relative = {path: path.relative_to(root).as_posix() for root, path in found}
    kept, budget = set(), request.max_bytes
    for path in sorted(sizes, key=lambda item: xxhash.xxh3_64_intdigest(relative[item].encode())):
        if sizes[path] > budget:
            break
        kept.add(path)
        budget -= sizes[path]
    if not kept:
        raise ConfigError(f"--max-bytes {request.max_bytes}: too small for the first file of the sample; raise it.")
    files = tuple(path for path in sizes if path in kept)
    left = [size for path, size in sizes.items() if path not in kept]
    return Selection(files, tuple(sizes[path] for path in files), len(left), sum(left))


def _walk(given: Path, request: CorpusRequest) -> Iterator[tuple[Path, Path]]:
    if given.is_file():
        yield given.parent, given
    elif given.is_dir():
        for folder, names, files in os.walk(given):
            names[:] = sorted(name for name in names if name not in request.exclude)
            if _SEVERAL in files:
                _refuse_several(Path(folder))
            if _STATE in files and _DESCRIPTION in files:
                yield from ((given, path) for path in _saved_files(Path(folder)))
                names.clear()
                continue
            for name in sorted(files):
                if any(fnmatch(name, pattern) for pattern in request.patterns):
                    yield given, Path(folder) / name
    else:
        raise ConfigError(f"--input {given}: no such file or folder.")


def _refuse_several(folder: Path) -> None:
    """A folder of several data sets: usually training and test data, which must not be mixed."""
    splits = read_json(folder / _SEVERAL, ConfigError).get("splits")
    names = splits if isinstance(splits, list) and splits else ["..."]
    raise ConfigError(
        f"--input {folder}: contains the data sets {', '.join(map(str, names))}; name those to read, for instance --input "
        f"{folder / str(names[0])}."
    )


def _saved_files(folder: Path) -> list[Path]:
    """The arrow files of a folder that datasets' save_to_disk wrote, in their order."""
    state = read_json(folder / _STATE, ConfigError)
    listed = state.get("_data_files")
    names = [item.get("filename") if isinstance(item, dict) else None for item in listed or [None]]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(
                f"--input {folder / _STATE}: _data_files: expected a list of objects with the key filename, a name in the same "
                f"folder, found {name!r:.100}."
            )
        if not (folder / name).is_file():
            raise ConfigError(f"--input {folder / name}: no such file, but {_STATE} lists it; copy the folder again.")
    return [folder / str(name) for name in names]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"--input {path}: cannot be read ({error.strerror}).") from error
