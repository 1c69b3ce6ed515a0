"""The content of a .pt archive as plain data: containers and numbers. Whatever else it names stays a stand-in."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Any

import torch

from incr_ds.checkpoint.torch_file.validate import walk_archive
from incr_ds.checkpoint.torch_file.walk import REBUILDS, StandIn

_TYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}
_REBUILD = REBUILDS[0].rpartition(".")[2]


def plain_content(path: Path, archive: zipfile.ZipFile) -> Any:
    """Read an archive, with a number in place of each tensor that holds a single one. Fails like ``walk_archive``."""
    content, _ = walk_archive(path, archive)
    return _plain(content, archive)


def _plain(value: Any, archive: zipfile.ZipFile) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item, archive) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, archive) for item in value]
    if isinstance(value, StandIn) and value.name == _REBUILD:
        return _number(value, archive)
    return value


def _number(value: StandIn, archive: zipfile.ZipFile) -> Any:
    """The number in a tensor of one element; the stand-in itself for any other tensor."""
    storage, offset, size, *_ = value.arguments
    _, kind, record, _, _ = storage.arguments[0]
    if math.prod(size) != 1 or kind.name not in _TYPES:
        return value
    name = next(name for name in archive.namelist() if name.endswith(f"/data/{record}"))
    numbers = torch.frombuffer(bytearray(archive.read(name)), dtype=_TYPES[kind.name])
    return numbers[offset].item()
