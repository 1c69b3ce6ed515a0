"""Reads Hugging Face folders, safetensors or .bin (one file or sharded), as logical checkpoints without moments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import CheckpointFacts, State, check_dtype, check_shapes, rows_and_columns, same_numbers
from incr_ds.checkpoint.naming import is_buffer, plain_names, refuse_adapters
from incr_ds.checkpoint.progress import counters
from incr_ds.checkpoint.torch_file.load import load_pt
from incr_ds.checkpoint.torch_file.schema import tensors
from incr_ds.config.json_file import LARGE, read_json, refuse_pointer
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Bounds

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_COMPARED_ROWS = 1024  # at once
_PLAIN_NAME = re.compile(r"[^/\0]{1,243}\.(safetensors|bin)")
# In the order in which transformers searches for them.
CONTENTS = (SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def weights_file(folder: Path) -> Path | None:
    """The file by which a folder is detected as a Hugging Face one: its weights, or the index of their shards."""
    return next((folder / name for name in CONTENTS if (folder / name).is_file()), None)


class HuggingFaceCheckpoint:
    """A folder that ``save_pretrained`` wrote. Slices are mapped from disk when they are read."""

    def __init__(self, folder: Path, architecture: Architecture, *, trust: bool = False) -> None:
        self.architecture = architecture
        saved_in = _tensor_files(weights_file(folder) or folder / SINGLE, trust)
        refuse_adapters(saved_in, str(folder))
        files = tuple(sorted(set(saved_in.values())))
        names = plain_names((name for name in saved_in if not is_buffer(name, architecture)), architecture)
        self._saved_as = {logical: name for name, logical in names.items()}
        self._file_of = {logical: saved_in[name] for logical, name in self._saved_as.items()}
        self._handles = {path: _open(path, trust) for path in files}
        for name, path in self._file_of.items():
            check_dtype(_dtype_of(self._slice(name)), name, str(path))
        shapes = {name: tuple(self._slice(name).get_shape()) for name in self._file_of}
        check_shapes(architecture, shapes, str(folder))
        kind = "safetensors" if files[0].suffix == ".safetensors" else ".bin"
        kind = f"Hugging Face {kind}"
        self.facts = CheckpointFacts(folder, kind, ("weight",), None, files, recorded=counters({}, folder))

    def read(self, name: str, state: State = "weight", bounds: Bounds | None = None) -> torch.Tensor:
        """Part of one weight in its stored dtype."""
        if state != "weight":
            raise CheckpointError(f"{self.facts.path}: a Hugging Face folder has no {state}; use optimizer: reset.")
        spec = self.architecture.by_name[name]
        first, stop, inside = rows_and_columns(bounds, spec.shape)
        found: torch.Tensor = self._slice(spec.tied_to or name)[first:stop][inside]
        return found

    def self_check(self) -> Iterator[str]:
        """Check that tied copies are equal, and yield the name of each tensor. Raises CheckpointError otherwise."""
        for spec in self.architecture.tensors:
            if spec.tied_to is not None and spec.name in self._file_of:
                if not self._are_equal(spec.name, spec.tied_to, spec.shape[0]):
                    raise CheckpointError(
                        f"{self.facts.path}: tie_word_embeddings is true, but {spec.name} differs from {spec.tied_to}."
                    )
            yield spec.name

    def _are_equal(self, first: str, second: str, rows: int) -> bool:
        parts = [slice(begin, begin + _COMPARED_ROWS) for begin in range(0, rows, _COMPARED_ROWS)]
        return all(same_numbers(self._slice(first)[part], self._slice(second)[part]) for part in parts)

    def _slice(self, name: str):  # type: ignore[no-untyped-def]  # safetensors has no types
        return self._handles[self._file_of[name]].get_slice(self._saved_as[name])


# By safetensors' names.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _dtype_of(part) -> str:  # type: ignore[no-untyped-def]  # safetensors has no types
    found = str(part.get_dtype())
    return _DTYPES.get(found, found)


class _Pickled:
    """A .bin file with the interface of an open safetensors file."""

    def __init__(self, path: Path, trust: bool) -> None:
        self._tensors = tensors(load_pt(path, trust=trust), path, "transformers")

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_slice(self, name: str) -> _PickledSlice:
        return _PickledSlice(self._tensors[name])


class _PickledSlice:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return str(self._tensor.dtype).removeprefix("torch.")

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._tensor[rows]


def _tensor_files(contents: Path, trust: bool) -> Mapping[str, Path]:
    if contents.suffix == ".json":
        return _indexed_files(contents, trust)
    return {name: contents for name in _open(contents, trust).keys()}


def _indexed_files(index: Path, trust: bool) -> Mapping[str, Path]:
    weight_map = read_json(index, CheckpointError, most=LARGE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index}: not a valid index of shards: weight_map: expected an object, found {weight_map!r:.80}."
        )
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise CheckpointError(f"{index}: {name}: {str(file)[:80]!r} is not a plain file name; refused.")
        files[name] = index.with_name(file)
    listed: dict[Path, set[str]] = {}
    for name, path in files.items():
        listed.setdefault(path, set()).add(name)
    for path, names in listed.items():
        present = set(_open(path, trust).keys())
        if present != names:
            odd = sorted(present ^ names)[0]
            raise CheckpointError(f"{path}: content differs from {index.name}: {odd} is only in one of the two.")
    return files


def _open(path: Path, trust: bool):  # type: ignore[no-untyped-def]  # safetensors has no types
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the folder is incomplete.")
    if path.suffix == ".bin":
        return _Pickled(path, trust)
    refuse_pointer(path)
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: damaged or truncated ({path.stat().st_size} bytes): {error}. Copy the file again."
        ) from error
