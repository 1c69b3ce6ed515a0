"""The checksums that torch.save puts beside every tensor, which torch.load does not look at."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from incr_ds.errors import CheckpointError
from incr_ds.source.outline import check_stored, is_archive, opened_archive
from incr_ds.source.unpickle import stubs_alone


def check_records(path: Path) -> None:
    """Read every record of a .pt file; CheckpointError naming the tensors of the first one whose CRC-32 is wrong.

    Files older than torch's zip format have no checksums, and files saved without them say zero: both pass.
    """
    if not is_archive(path):
        return
    with opened_archive(path) as archive:
        check_stored(path, archive)
        for record in archive.infolist():
            try:
                if record.CRC:
                    _read(archive, record)
            except Exception as error:  # a damaged header raises anything
                raise CheckpointError(
                    f"{path}: {_named(path, record.filename)} is damaged ({error}). Copy the file again from where it was "
                    "written, or use another tag."
                ) from error


def _read(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> None:
    with archive.open(record) as stream:
        while stream.read(1 << 20):
            pass


def _named(path: Path, record: str) -> str:
    """The tensors that a record holds, by where they are in the file's content."""
    try:
        names = record_names(path).get(record.partition("/")[2], [])
    except Exception:  # a damaged pickle names nothing
        names = []
    return f"{', '.join(names[:3])} (record {record})" if names else f"record {record}"


def record_names(path: Path) -> Mapping[str, list[str]]:
    """For each record of a .pt file, where in its content the tensors stand that it holds: ``module.lm_head.weight``."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # a second, for who needs it

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
