"""Hugging Face safetensors folders (one file or sharded) as logical checkpoints: weights only, no moments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from incr_ds.arch.architecture import Architecture
from incr_ds.arch.logical import CheckpointFacts, State, check_shapes
from incr_ds.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class HuggingFaceCheckpoint:
    """A folder that ``save_pretrained`` writes; slices are mapped from disk when asked for."""

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self._architecture = architecture
        self._saved_as = {spec.name: spec.saved_name for spec in architecture.tensors}
        logical = {saved: name for name, saved in self._saved_as.items()}
        self._file_of = {logical.get(name, name): path for name, path in _tensor_files(folder).items()}
        files = tuple(sorted(set(self._file_of.values())))
        self._handles = {path: _open(path) for path in files}
        shapes = {name: tuple(self._slice(name).get_shape()) for name in self._file_of}
        check_shapes(architecture, shapes, str(folder))
        self._facts = CheckpointFacts(folder, "Hugging Face safetensors", ("weight",), None, {}, {}, files)

    @property
    def facts(self) -> CheckpointFacts:
        """What is known without reading a tensor."""
        return self._facts

    @property
    def architecture(self) -> Architecture:
        """The model that the checkpoint holds."""
        return self._architecture

    def read(self, name: str, state: State = "weight", rows: slice | None = None) -> torch.Tensor:
        """Rows of one weight in its stored dtype."""
        if state != "weight":
            raise CheckpointError(f"{self._facts.path}: a Hugging Face folder has no {state}; use optimizer: reset.")
        spec = self._architecture.by_name[name]
        first, stop, _ = (rows or slice(None)).indices(spec.shape[0])
        found: torch.Tensor = self._slice(spec.tied_to or name)[first:stop]
        return found

    def self_check(self) -> Iterator[str]:
        """Tied copies must be equal; yields the name of each tensor seen. CheckpointError otherwise."""
        for spec in self._architecture.tensors:
            if spec.tied_to is not None and spec.name in self._file_of:
                if not torch.equal(self._slice(spec.name)[:], self._slice(spec.tied_to)[:]):
                    raise CheckpointError(
                        f"{self._facts.path}: tie_word_embeddings is true, but {spec.name} differs from {spec.tied_to}."
                    )
            yield spec.name

    def _slice(self, name: str):  # type: ignore[no-untyped-def]  # safetensors has no types
        return self._handles[self._file_of[name]].get_slice(self._saved_as.get(name, name))


def _tensor_files(folder: Path) -> Mapping[str, Path]:
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    path = folder / SINGLE
    return {name: path for name in _open(path).keys()}


def _indexed_files(folder: Path) -> Mapping[str, Path]:
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / INDEX}: not a safetensors index (no weight_map): {error}") from error
    files = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: {name}: {file!r} is not a plain file name; refused.")
        files[name] = folder / file
    listed: dict[Path, set[str]] = {}
    for name, path in files.items():
        listed.setdefault(path, set()).add(name)
    for path, names in listed.items():
        present = set(_open(path).keys())
        if present != names:
            odd = sorted(present ^ names)[0]
            raise CheckpointError(f"{path}: does not hold what {INDEX} says: {odd} is in one of the two only.")
    return files


def _open(path: Path):  # type: ignore[no-untyped-def]  # safetensors has no types
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the folder is incomplete.")
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated ({path.stat().st_size} bytes): {error}. Copy the file again."
        ) from error
