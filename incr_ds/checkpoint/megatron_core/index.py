"""Writes the file .metadata: torch.distributed.checkpoint's own classes, which say where each chunk lies. No process group."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from incr_ds.checkpoint.megatron_core.metadata import Place

_PROTOCOL = 4  # fixed, so that the bytes do not depend on Python's version


@dataclass(frozen=True)
class IndexedTensor:
    """A tensor's shape and dtype, and the place of each of its chunks by its offsets and sizes."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: dict[tuple[tuple[int, ...], tuple[int, ...]], Place] = field(default_factory=dict)


def index_bytes(tensors: Mapping[str, IndexedTensor], objects: Mapping[str, Place]) -> bytes:
    """The content of .metadata for ``tensors`` and serialized ``objects``, both by their keys."""
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    described = {
        key: TensorStorageMetadata(
            TensorProperties(dtype=tensor.dtype),
            torch.Size(tensor.shape),
            [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in tensor.chunks],
        )
        for key, tensor in tensors.items()
    }
    places = [
        (MetadataIndex(key, offsets), place)
        for key, tensor in tensors.items()
        for (offsets, _), place in tensor.chunks.items()
    ]
    places += [(MetadataIndex(key), place) for key, place in objects.items()]
    content = Metadata(
        state_dict_metadata={**described, **{key: BytesStorageMetadata() for key in objects}},
        planner_data={},
        storage_data=_storage(places),
    )
    return pickle.dumps(content, protocol=_PROTOCOL)


def _storage(places: Iterable[tuple[Any, Place]]) -> dict[Any, Any]:
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return {index: _StorageInfo(place.file, place.offset, place.length) for index, place in places}
