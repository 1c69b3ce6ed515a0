"""Reads the text column of Parquet and Arrow files, some rows at a time. Arrow files are those of Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from incr_ds.errors import ConfigError

ROWS_AT_ONCE = 64
_FILE_MAGIC = b"ARROW1"  # of Arrow's file format; without it, a file is in the streaming format


def read_rows(stream: FileIO, path: Path, start: int, key: str) -> Iterator[tuple[int, list[Any], int]]:
    """Yield rows of the column ``key`` from row ``start`` on: the number of the first (from 0), the rows, bytes read so far.

    The bytes are an estimate by rows. Raises ConfigError for a damaged file, and for a column that is missing or not text.
    """
    try:
        batches = _parquet(stream, path, start, key) if path.suffix == ".parquet" else _arrow(stream, path, key)
        for first, column, read in batches:
            column.validate(full=True)  # offsets of an untrusted file may point outside of it
            for inner in range(max(0, start - first), len(column), ROWS_AT_ONCE):
                yield first + inner, column.slice(inner, ROWS_AT_ONCE).to_pylist(), read
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--input {path}: cannot be read as {path.suffix[1:]} ({str(error).strip():.300})."
        ) from error


def _parquet(stream: FileIO, path: Path, start: int, key: str) -> Iterator[tuple[int, Any, int]]:
    file, size = pq.ParquetFile(stream), path.stat().st_size
    _check_column(file.schema_arrow, path, key)
    first, total = 0, file.metadata.num_rows
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        if first + rows <= start:
            first += rows
            continue
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[key], use_threads=False):
            yield first, batch.column(0), size * (first + len(batch)) // total
            first += len(batch)


def _arrow(stream: FileIO, path: Path, key: str) -> Iterator[tuple[int, Any, int]]:
    is_file = stream.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
        _check_column(reader.schema, path, key)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else iter(reader)
        first, column, size = 0, reader.schema.get_field_index(key), path.stat().st_size
        for number, batch in enumerate(batches, start=1):
            read = size * number // reader.num_record_batches if is_file else source.tell()
            yield first, batch.column(column), read
            first += batch.num_rows


def _check_column(schema: Any, path: Path, key: str) -> None:
    names = schema.names
    if names.count(key) != 1:
        raise ConfigError(
            f"--input {path}: expected one column {key}, found the columns {', '.join(names) or 'none'}; name the text's with "
            "--text-key."
        )
    kind = schema.field(key).type
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)):
        raise ConfigError(
            f"--input {path}: the column {key} holds {kind}, expected strings; name another with --text-key."
        )
