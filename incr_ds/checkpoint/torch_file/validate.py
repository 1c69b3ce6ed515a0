"""Checks what a .pt file states about its tensors before torch maps them.

torch.load(mmap=True) ignores the sizes of the archive's records. So a tensor could reach into other records, or read
compressed ones as if they were numbers.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from incr_ds.checkpoint.torch_file.walk import Walker, WalkError
from incr_ds.errors import CheckpointError

MOST_PICKLED = 64 << 20  # bytes of names and numbers beside the tensors; a model of 100,000 tensors has 20 million
ARCHIVE, LEGACY = b"PK", b"\x80\x02"  # first bytes of a zip archive, and of a bare pickle
_STORAGE_BYTES = {
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
    "ComplexFloatStorage": 8,
    "ComplexDoubleStorage": 16,
    "UntypedStorage": 1,
}


def check_outline(path: Path) -> None:
    """Raise CheckpointError if a .pt file is not a plain archive, or if a tensor reaches beyond its own record."""
    if not is_archive(path):
        raise CheckpointError(_not_an_archive(path))
    with named_damage(path):
        with opened_archive(path) as archive:
            walk_archive(path, archive)


@contextmanager
def named_damage(path: Path, inside: str = "") -> Iterator[None]:
    """Turn what a damaged or hostile pickle in ``path`` raises into a CheckpointError that names the file.

    ``inside`` is the pickle's place in the file, if there are several.
    """
    try:
        yield
    except CheckpointError:
        raise
    except WalkError as error:
        raise CheckpointError(f"{path}: {inside}{error}") from error
    except Exception as error:  # a damaged pickle raises many kinds of errors
        raise CheckpointError(damaged(path, error)) from error


def walk_archive(path: Path, archive: zipfile.ZipFile) -> tuple[Any, list[tuple[Any, ...]]]:
    """The content of a .pt archive with a StandIn for everything that it names, and its tensors as ``Walker`` finds them.

    Raises CheckpointError if a tensor reaches beyond its record, and WalkError or any other error if the pickle is damaged.
    """
    check_stored(path, archive)
    pickled = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
    if pickled is None:
        raise CheckpointError(f"{path}: no record data.pkl; this is not a file that torch.save wrote.")
    folder = pickled.removesuffix("data.pkl")
    sizes = {record.filename.removeprefix(folder): record.file_size for record in archive.infolist()}
    if sizes["data.pkl"] > MOST_PICKLED:
        raise WalkError(f"its pickle has {sizes['data.pkl']:,} bytes, but at most {MOST_PICKLED:,} are read.")
    walker = Walker(archive.read(pickled))
    content, tensors = walker.content(), walker.tensors_found
    problem = next(_problems(tensors, sizes), None)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}. The file is damaged, or was made to mislead; it was refused.")
    return content, tensors


def is_archive(path: Path) -> bool:
    """Whether a file starts like a zip archive, complete or not."""
    return _first_bytes(path) == ARCHIVE


def opened_archive(path: Path) -> zipfile.ZipFile:
    """Open the archive of a .pt file. Raises CheckpointError if its directory is damaged."""
    try:
        if zipfile.is_zipfile(path):
            return zipfile.ZipFile(path)
    except Exception as error:  # with a damaged directory, either call raises many kinds of errors
        raise CheckpointError(damaged(path, error)) from error
    raise CheckpointError(damaged(path, ValueError("its end, where an archive lists its records, is missing")))


def check_stored(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise CheckpointError if a record is compressed. torch never writes one, and its unpacked size has no bound."""
    for record in archive.infolist():
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise CheckpointError(
                f"{path}: record {record.filename} is compressed ({record.compress_size} to {record.file_size} bytes); "
                "torch.save stores records as they are. Unpack the file and store it again, without compression."
            )


def damaged(path: Path, error: Exception) -> str:
    """A message for a file that cannot be read."""
    why = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
    return (
        f"{path}: damaged or truncated ({path.stat().st_size} bytes): {why}. Copy the file again from where "
        "it was written, or use another tag."
    )


def _not_an_archive(path: Path) -> str:
    if _first_bytes(path) == LEGACY:
        return (
            f"{path}: in the format of torch before 1.6, which cannot be mapped or read in parts; load it where you trust it "
            "and torch.save it again."
        )
    return damaged(path, ValueError("not an archive of torch.save"))


def _first_bytes(path: Path) -> bytes:
    with open(path, "rb") as stream:
        return stream.read(2)


def _problems(tensors: list[tuple[Any, ...]], sizes: Mapping[str, int]) -> Iterator[str]:
    for (_, storage, key, _, numel), offset, size, strides, *more in tensors:
        record = f"data/{key}"
        held = numel * _itemsize(storage.name)
        if record not in sizes:
            yield f"record {record} is missing"
            continue
        if held > sizes[record]:
            yield f"record {record} has {sizes[record]} bytes, a tensor expects {held} there"
        # In the third version of the call, the dtype is an argument and the storage counts bytes.
        available = held // (_itemsize(more[0].name) if more else _itemsize(storage.name))
        elements = math.prod(size)
        last = offset + sum((length - 1) * stride for length, stride in zip(size, strides, strict=True))
        if min((offset, *size, *strides)) < 0 or (elements and last >= available):
            yield f"a tensor of shape {list(size)} reaches beyond the {available} elements of record {record}"
        elif elements > available:
            yield f"a tensor of shape {list(size)} repeats the {available} elements of record {record}"


def _itemsize(name: str) -> int:
    """Bytes per element of a storage class or dtype of torch."""
    if name in _STORAGE_BYTES:
        return _STORAGE_BYTES[name]
    dtype: torch.dtype = getattr(torch, name)
    return dtype.itemsize
