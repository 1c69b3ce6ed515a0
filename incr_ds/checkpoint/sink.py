"""Writes a file from front to back and computes its checksums on the way, so that nothing is read again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash

Label = tuple[str, str]  # a tensor and one of its states
_SMALL = 64 << 10  # bytes that are collected, so that headers and small tensors do not need a system call each


@dataclass
class _Extent:
    """A range of bytes that holds elements of one tensor."""

    label: Label
    offset: int
    bytes: int = 0
    digest: xxhash.xxh3_128 = field(default_factory=xxhash.xxh3_128)

    def described(self) -> dict[str, Any]:
        name, state = self.label
        checksum = self.digest.hexdigest()
        return {"tensor": name, "state": state, "offset": self.offset, "bytes": self.bytes, "xxh3": checksum}


class Sink:
    """Appends bytes to a new file, and records size and xxh3 of the whole file and of each tensor in it."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "wb", buffering=_SMALL)
        self._digest = xxhash.xxh3_128()
        self._extents: list[_Extent] = []
        self.position = 0

    def write(self, data: bytes | memoryview, label: Label | None = None) -> None:
        """Append ``data``, which holds elements of the tensor ``label``."""
        self._digest.update(data)
        if label is not None:
            self._extent(label, data)
        self._stream.write(data)
        self.position += len(data)

    @property
    def digest(self) -> dict[str, Any]:
        """Size and checksum of what was written, and of each tensor in it, in the form of a manifest."""
        tensors = {"tensors": [extent.described() for extent in self._extents]} if self._extents else {}
        return {"bytes": self.position, "xxh3": self._digest.hexdigest(), **tensors}

    def _extent(self, label: Label, data: bytes | memoryview) -> None:
        last = self._extents[-1] if self._extents else None
        if last is None or last.label != label or last.offset + last.bytes != self.position:
            last = _Extent(label, self.position)
            self._extents.append(last)
        last.digest.update(data)
        last.bytes += len(data)

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()


def data_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.view(torch.uint8).numpy().data
