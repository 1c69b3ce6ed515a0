"""A file written from front to back whose checksum is known when it is closed: nothing is read again."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash


class Sink:
    """Appends bytes to a new file and keeps their size and xxh3."""

    def __init__(self, path: Path) -> None:
        self._stream = open(path, "wb", buffering=0)
        self._digest = xxhash.xxh3_128()
        self.position = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append ``data``."""
        self._digest.update(data)
        left = memoryview(data)
        while len(left):
            left = left[self._stream.write(left) :]
        self.position += len(data)

    @property
    def digest(self) -> dict[str, Any]:
        """Size and checksum of what was written, as a manifest lists them."""
        return {"bytes": self.position, "xxh3": self._digest.hexdigest()}

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()


def data_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without a copy."""
    return tensor.view(torch.uint8).numpy().data
