"""Checks the checksums that torch.save stores for every tensor and that torch.load ignores."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from isal.isal_zlib import crc32

from incr_ds.checkpoint.torch_file.load import stubs_alone
from incr_ds.checkpoint.torch_file.validate import check_stored, is_archive, opened_archive
from incr_ds.config.json_file import file_blocks
from incr_ds.errors import CheckpointError

_HEADER_MAGIC = b"PK\x03\x04"
_HEADER = struct.Struct("<26xHH")  # of a record: magic and more fields, length of the name, length of the extra field


@dataclass(frozen=True)
class RecordExtent:
    """A record at bytes [start, stop) of a file."""

    record: zipfile.ZipInfo
    start: int
    stop: int


def check_records(path: Path) -> str:
    """Read a .pt file once, check its records, and return its xxh3 (128 bits, hexadecimal).

    Raises CheckpointError that names the tensors of the first record with a wrong CRC-32. Files older than torch's zip format
    have no checksums, and files saved without them have zeros. Both pass.
    """
    extents = _extents(path) if is_archive(path) else []
    digest, sums = xxhash.xxh3_128(), [0] * len(extents)
    position, current = 0, 0
    for block in file_blocks(path):
        digest.update(block)
        end = position + len(block)
        while current < len(extents) and extents[current].start < end:
            extent = extents[current]
            part = block[max(0, extent.start - position) : max(0, extent.stop - position)]
            sums[current] = crc32(part, sums[current])
            if extent.stop > end:
                break
            current += 1
        position = end
    for extent, found in zip(extents, sums, strict=True):
        if extent.stop > position:
            raise CheckpointError(_damaged_record(path, extent.record, f"it ends after {position} bytes"))
        if found != extent.record.CRC:
            raise CheckpointError(
                _damaged_record(
                    path, extent.record, f"its CRC-32 is {found:08x}, but torch.save stored {extent.record.CRC:08x}"
                )
            )
    return digest.hexdigest()


def _extents(path: Path) -> list[RecordExtent]:
    """The records that have a checksum, in their order in the file."""
    with opened_archive(path) as archive, open(path, "rb") as stream:
        check_stored(path, archive)
        found = [record_extent(path, stream, record) for record in archive.infolist() if record.CRC]
    return sorted(found, key=lambda extent: extent.start)


def record_extent(path: Path, stream: BinaryIO, record: zipfile.ZipInfo) -> RecordExtent:
    """Where a record's data lies in a file. Raises CheckpointError if there is no header where the directory says."""
    inside = 0 <= record.header_offset < path.stat().st_size
    header = os.pread(stream.fileno(), _HEADER.size, record.header_offset) if inside else b""
    if len(header) < _HEADER.size or not header.startswith(_HEADER_MAGIC):
        raise CheckpointError(_damaged_record(path, record, "its header differs from the directory's"))
    name_bytes, extra_bytes = _HEADER.unpack(header)
    start = record.header_offset + _HEADER.size + name_bytes + extra_bytes
    return RecordExtent(record, start, start + record.file_size)


def _damaged_record(path: Path, record: zipfile.ZipInfo, why: str) -> str:
    return (
        f"{path}: {_named(path, record.filename)} is damaged ({why}). Copy the file again from where it was "
        "written, or use another tag."
    )


def _named(path: Path, record: str) -> str:
    """The tensors that a record holds, by their paths in the file's content."""
    try:
        names = record_names(path).get(record.partition("/")[2], [])
    except Exception:  # the pickle is damaged, too, so no name is known
        names = []
    return f"{', '.join(names[:3])} (record {record})" if names else f"record {record}"


def record_names(path: Path) -> Mapping[str, list[str]]:
    """For each record of a .pt file, the paths of its tensors in the content: ``module.lm_head.weight``."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second, so only if it is needed

    reader: Any = torch._C.PyTorchFileReader(str(path))
    records = {reader.get_record_offset(name): name for name in reader.get_all_records()}
    with FakeTensorMode(), stubs_alone():
        content = torch.load(path, weights_only=True)
    names: dict[str, list[str]] = {}
    for name, tensor in _tensors("", content):
        offset: Any = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if offset in records:
            names.setdefault(records[offset], []).append(name)
    return names


def _tensors(name: str, content: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield name, content
    elif isinstance(content, dict | list | tuple):
        items = content.items() if isinstance(content, dict) else enumerate(content)
        for key, value in items:
            yield from _tensors(f"{name}.{key}" if name else str(key), value)
