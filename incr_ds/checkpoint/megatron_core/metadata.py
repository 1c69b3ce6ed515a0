"""Reads the file .metadata of torch.distributed.checkpoint as plain data: which chunk of which tensor lies where.

The file is a pickle. Nothing in it is run: every class in it is replaced by a stand-in that stores its arguments.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch

from incr_ds.checkpoint.base import FLOATING
from incr_ds.checkpoint.torch_file.validate import MOST_PICKLED, named_damage
from incr_ds.checkpoint.torch_file.walk import StandIn, Walker
from incr_ds.errors import CheckpointError

FILE = ".metadata"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATING}
_OURS = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
_FURTHER = {"torch.Size", "torch.serialization._get_layout", "pathlib.PosixPath", "collections.OrderedDict"}
_FILE_NAME = re.compile(r"[^/\\\0]{1,200}\.distcp")
_LARGEST = 1 << 62
_MOST_COMPARED = 2048
_TIMES = 4  # the work of another pickle: a mixture has a chunk for each layer, expert, tensor rank and state
_ORIGINAL = "nd_reformulated_orig_global_shape"  # Megatron-core's name for the shape of a tensor that it flattened


@dataclass(frozen=True)
class Place:
    """Bytes [offset, offset + length) of a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor: its first position and its size in each dimension, and where it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint. Its chunks cover it exactly once. ``dtype`` is the name of a type of torch.

    ``parts`` is None, or into how many equal parts each dimension was cut before they were flattened. A chunk's offsets and
    sizes are then the number of its part in each dimension, and a range of the part's elements in row-major order.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]
    parts: tuple[int, ...] | None = None

    @property
    def type(self) -> torch.dtype:
        """The dtype, for one of floating-point numbers."""
        return _DTYPES[self.dtype]

    def at(self, stack: tuple[int, ...]) -> tuple[Chunk, ...]:
        """All chunks or, if tensors are stacked, at least those of the one at ``stack``."""
        return self._by_first[stack[0]] if stack else self.chunks

    @cached_property
    def _by_first(self) -> Mapping[int, tuple[Chunk, ...]]:
        """The chunks at each position of the first dimension; a mixture has thousands."""
        found: dict[int, list[Chunk]] = {}
        for chunk in self.chunks:
            for position in range(chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]):
                found.setdefault(position, []).append(chunk)
        return {position: tuple(chunks) for position, chunks in found.items()}


@dataclass(frozen=True)
class Stored:
    """What a checkpoint stores: tensors, and serialized objects, by their keys."""

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, Place]


def read_metadata(folder: Path) -> Stored:
    """Read and check ``folder``/.metadata. Raises CheckpointError if it is damaged or refers to anything else."""
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing; the checkpoint is incomplete. Copy the file back or use another iteration."
        )
    size = path.stat().st_size
    if size > MOST_PICKLED:
        raise CheckpointError(f"{path}: {size:,} bytes, but at most {MOST_PICKLED:,} of a pickle are read.")
    with named_damage(path):
        walker = Walker(path.read_bytes(), _TIMES)
        content = walker.content()
        _refuse_foreign(walker, path)
        return _stored(content, path)


def _refuse_foreign(walker: Walker, path: Path) -> None:
    known = _FURTHER | {f"torch.{dtype}" for dtype in dir(torch) if isinstance(getattr(torch, dtype), torch.dtype)}
    foreign = sorted(name for name in walker.named if name not in known and not name.startswith(_OURS))
    if foreign:
        raise CheckpointError(
            f"{path}: refers to {', '.join(foreign[:5])}; torch.distributed.checkpoint writes no such thing there. The file was "
            "refused, and nothing of it was run."
        )


def _stored(content: Any, path: Path) -> Stored:
    fields = attributes(content)
    described, places = fields["state_dict_metadata"], _places(fields["storage_data"], path)
    flattened = {key: _size(entry[_ORIGINAL]) for key, entry in (fields.get("mcore_data") or {}).items() if entry}
    tensors, objects = {}, {}
    for key, entry in described.items():
        if entry.name == "BytesStorageMetadata":
            objects[str(key)] = places[key, ()]
        else:
            stored = _tensor(key, attributes(entry), places, path)
            tensors[str(key)] = _flattened(key, stored, flattened[key], path) if key in flattened else stored
    return Stored(tensors, objects)


def _places(entries: Mapping[Any, Any], path: Path) -> Mapping[tuple[str, tuple[int, ...]], Place]:
    found = {}
    for index, info in entries.items():
        key, place = attributes(index), attributes(info)
        if place.get("transform_descriptors"):
            raise CheckpointError(
                f"{path}: {key['fqn']}: stored with {place['transform_descriptors']}; only plain shards can be read. Save the "
                "checkpoint without compression."
            )
        file = place["relative_path"]
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise CheckpointError(
                f"{path}: {key['fqn']}: {str(file)[:80]!r} is not the name of a .distcp file; refused."
            )
        offset, length = _numbers((place["offset"], place["length"]))
        found[key["fqn"], _size(key.get("offset"))] = Place(file, offset, length)
    return found


def _tensor(key: str, fields: Mapping[str, Any], places: Mapping[Any, Place], path: Path) -> StoredTensor:
    shape = _size(fields["size"])
    dtype = fields["properties"].held[-1][0].name
    parts = [(_size(part["offsets"]), _size(part["sizes"])) for part in map(attributes, fields["chunks"])]
    for offsets, sizes in parts:
        inside = len(offsets) == len(sizes) == len(shape)
        if not inside or any(o + s > whole for o, s, whole in zip(offsets, sizes, shape, strict=True)):
            raise CheckpointError(
                f"{path}: {key}: a chunk {list(sizes)} at {list(offsets)} lies outside {list(shape)}."
            )
        if (key, offsets) not in places:
            raise CheckpointError(
                f"{path}: {key}: no file for its chunk at {list(offsets)}; the checkpoint is incomplete."
            )
    chunks = tuple(Chunk(offsets, sizes, places[key, offsets]) for offsets, sizes in sorted(parts))
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(shape) or _overlap(chunks):
        raise CheckpointError(
            f"{path}: {key}: its chunks hold {covered} elements, expected the {math.prod(shape)} of shape {list(shape)} once "
            "each. A rank's part is missing, or the file is damaged."
        )
    return StoredTensor(shape, dtype, chunks)


def _flattened(key: str, stored: StoredTensor, shape: tuple[int, ...], path: Path) -> StoredTensor:
    """The tensor of ``shape`` whose equal parts are stored, each as one row of elements."""
    *parts, elements = stored.shape
    fits = len(parts) == len(shape) and all(n and size % n == 0 for size, n in zip(shape, parts, strict=True))
    if not fits or math.prod(shape) != elements * math.prod(parts):
        raise CheckpointError(
            f"{path}: {key}: {list(stored.shape)} are not equal parts of {list(shape)}, one flattened part after the other."
        )
    return replace(stored, shape=shape, parts=tuple(parts))


def _overlap(chunks: Sequence[Chunk], dimension: int = 0) -> bool:
    """Whether two chunks, which share positions in all earlier dimensions, share an element.

    Ranks cut in a grid, so chunks with different ranges in a dimension are mostly apart. Only those that are not are
    compared one with the other. More than a few thousand of these are no ranks' work, and count as overlapping.
    """
    if len(chunks) < 2 or dimension == len(chunks[0].offsets):
        return len(chunks) > 1
    ranges: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in chunks:
        ranges.setdefault((chunk.offsets[dimension], chunk.sizes[dimension]), []).append(chunk)
    if all(first + size <= after for (first, size), (after, _) in pairwise(sorted(ranges))):
        return any(_overlap(own, dimension + 1) for own in ranges.values())
    return len(chunks) > _MOST_COMPARED or any(_share_element(one, other) for one, other in combinations(chunks, 2))


def _share_element(one: Chunk, other: Chunk) -> bool:
    pairs = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(a < b + m and b < a + n for a, n, b, m in pairs)


def attributes(value: Any) -> dict[str, Any]:
    """The attributes that a pickled object was given."""
    found = [state for state in value.held if isinstance(state, dict)]
    return {str(key): item for state in found for key, item in state.items()}


def _size(value: Any) -> tuple[int, ...]:
    """A torch.Size; () for None."""
    if value is None:
        return ()
    return _numbers(value.arguments[0] if isinstance(value, StandIn) else value)


def _numbers(values: Any) -> tuple[int, ...]:
    found = tuple(values)
    if any(not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _LARGEST for value in found):
        raise pickle.UnpicklingError(f"expected sizes, found {found!r:.80}")
    return found
