"""Reads a file in blocks of bytes, decompressed if its name ends with .gz or .zst, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from gzip import BadGzipFile
from io import FileIO
from pathlib import Path

from isal import igzip
from isal.igzip_lib import IsalError

from incr_ds.errors import ConfigError

BLOCK_BYTES = 1 << 18
# zstd expands one byte to at most 32 KiB, so that this many give blocks of 128 MiB at the very worst.
_ZSTD_INPUT = 1 << 12
_LARGEST_WINDOW = 1 << 31  # of `zstd --long=31`, with which large archives are made


def text_blocks(stream: FileIO, path: Path, offset: int = 0) -> Iterator[bytes]:
    """Yield the text of the open file ``path`` from byte ``offset`` of the decompressed text, in blocks that are not empty.

    Raises ConfigError if the file is not what its name says, or ends too early.
    """
    if path.suffix not in (".gz", ".zst"):
        stream.seek(offset)
        return iter(lambda: stream.read(BLOCK_BYTES), b"")
    blocks = _from_gzip(stream, path) if path.suffix == ".gz" else _from_zstd(stream, path)
    return _behind(blocks, offset)


def _behind(blocks: Iterator[bytes], offset: int) -> Iterator[bytes]:
    """The blocks without their first ``offset`` bytes."""
    for block in blocks:
        rest, offset = block[offset:], max(0, offset - len(block))
        if rest:
            yield rest


def _from_gzip(stream: FileIO, path: Path) -> Iterator[bytes]:
    try:
        with igzip.open(stream, "rb") as packed:
            while block := packed.read(BLOCK_BYTES):
                yield block
    except EOFError as error:
        raise ConfigError(f"--input {path}: the gzip file ends too early; copy it again.") from error
    except (BadGzipFile, IsalError) as error:  # type: ignore[misc]  # typed as if it were no exception
        raise ConfigError(f"--input {path}: not a whole gzip file ({error}).") from error


def _from_zstd(stream: FileIO, path: Path) -> Iterator[bytes]:
    """zstandard's own streams end silently where a file was cut, so frames are followed one by one."""
    from zstandard import ZstdDecompressor, ZstdError

    decompressor = ZstdDecompressor(max_window_size=_LARGEST_WINDOW)
    frame, held = None, bytearray()
    try:
        while given := stream.read(_ZSTD_INPUT):
            while given:
                frame = frame or decompressor.decompressobj()
                held += frame.decompress(given)
                given = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
            if len(held) >= BLOCK_BYTES:
                yield bytes(held)
                held.clear()
    except ZstdError as error:
        raise ConfigError(f"--input {path}: not a whole zstd file ({error}).") from error
    if frame is not None:
        raise ConfigError(f"--input {path}: the zstd file ends too early; copy it again.")
    if held:
        yield bytes(held)
