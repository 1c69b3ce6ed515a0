"""Publishing: a folder appears whole, with a manifest of every file, or not at all."""

from __future__ import annotations

import errno
import glob
import json
import os
import platform
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash

from incr_ds.checkpoint.manifest import VERSION, check_manifest
from incr_ds.checkpoint.parents import own_parents
from incr_ds.config.json_file import LARGE, file_blocks, parse_json, read_text
from incr_ds.errors import CheckpointError

MANIFEST = "manifest.json"
_PACKAGES = ("incr_ds", "torch", "numpy", "safetensors", "transformers", "deepspeed")
Check = Callable[[Path, Mapping[str, Any]], str]


@contextmanager
def publish(
    final: Path, kind: str, facts: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[Path]:
    """Yield a temporary folder beside ``final``, and publish it as ``final`` if the block succeeds.

    Every file is flushed to disk. manifest.json (size and xxh3 of each file, ``kind``, ``facts``, versions) is written last,
    and one rename makes the folder visible. ``known`` holds digests of files that the block has flushed, at its end. If the
    block raises, the temporary folder is removed and ``final`` unchanged. Raises CheckpointError if ``final`` exists and is
    not empty.
    """
    refuse_existing(final)
    remove_abandoned(final)
    try:
        with temporary_beside(final) as temporary:
            yield temporary
            seal(temporary, kind, facts, known)
            reveal(temporary, final)
    except OSError as error:
        where = error.filename or "while writing"
        raise CheckpointError(f"{final}: {error.strerror or error} ({where}); nothing was published.") from error


def refuse_existing(final: Path, *, overwrite: bool | None = None) -> None:
    """Raise CheckpointError if publishing would destroy ``final``.

    With ``overwrite``, a folder that was published itself may be replaced. None means that the caller has no such option.
    """
    if not final.exists() or (final.is_dir() and not any(final.iterdir())):
        return
    if not overwrite:
        option = "" if overwrite is None else " (--overwrite replaces a published checkpoint)"
        raise CheckpointError(
            f"{final}: exists already and is not an empty folder; choose another output or remove it{option}."
        )
    if not (final / MANIFEST).is_file():
        raise CheckpointError(
            f"{final}: contains no {MANIFEST}, so incr_ds did not publish it, and --overwrite does not apply; remove it."
        )


def check_writable(folder: Path) -> None:
    """Raise CheckpointError unless files can be written to ``folder``, which may not exist yet. Call this before long work."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "a part of the path is a file", str(existing))
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror}: {error.filename or folder}); nothing was done. "
            "Choose another output."
        ) from error


def temporary_folder(final: Path) -> Path:
    """A name beside ``final`` that no other run uses. A killed run leaves the folder behind, and nothing reads it."""
    return final.parent / f".{final.name}.incomplete-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextmanager
def temporary_beside(final: Path) -> Iterator[Path]:
    """Yield a folder beside ``final``. The block may move it or its content; the rest is removed."""
    folder = temporary_folder(final)
    with own_parents(final):
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(final: Path) -> None:
    """Remove what killed runs on this machine left behind while writing ``final``. Folders of live processes stay."""
    prefix = f".{final.name}.incomplete-{socket.gethostname()}-"
    for left in final.parent.glob(f"{glob.escape(prefix)}*"):
        process = left.name.removeprefix(prefix).partition("-")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def refuse_overlap(source: Path, output: Path) -> None:
    """Raise CheckpointError if one folder contains the other, since the source must not change while it is read."""
    one, other = source.resolve(), output.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise CheckpointError(
            f"{output}: one of the output and the source {source} is inside the other, and the source must not change; choose an "
            "output beside it."
        )


def seal(
    folder: Path, kind: str, facts: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Flush every file of ``folder`` and write its manifest. ``known`` has the digests of files that were flushed before."""
    known = known or {}
    names = file_sizes(folder)
    if unseen := sorted(set(known) - set(names)):
        raise CheckpointError(
            f"{folder / unseen[0]}: written, but not visible here; the output must be in a folder that all processes share."
        )
    files = {name: known[name] if name in known else flushed_digest(folder / name) for name in names}
    content = {"kind": kind, "versions": installed_versions(), "facts": facts, "files": files}
    write_atomically(folder / MANIFEST, _manifest_text(content))
    for inner in {path.parent for path in _files(folder)}:
        flush(inner)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect what is written; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def reveal(temporary: Path, final: Path) -> None:
    """Make a sealed folder visible under its name. If the disk cannot confirm the name, the folder is hidden again."""
    if final.is_dir():
        final.rmdir()
    os.rename(temporary, final)
    try:
        flush(final.parent)
    except OSError:
        os.rename(final, temporary)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file. Readers see either the old or the new content, never a part of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a published folder. Raises CheckpointError if it is missing, invalid or was changed."""
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(f"{path}: missing; the folder was not published by incr_ds, or is incomplete.")
    text = read_text(path, CheckpointError, most=LARGE)
    content = parse_json(text, CheckpointError, str(path))
    if not isinstance(content, dict) or content.get("manifest_version") != VERSION:
        raise CheckpointError(f"{path}: not a valid manifest of version {VERSION}.")
    if text != _manifest_text(
        {key: value for key, value in content.items() if key not in ("manifest_version", "checksum")}
    ):
        raise CheckpointError(f"{path}: its own checksum does not match its content: the manifest was changed.")
    check_manifest(content, path)
    return content


def _manifest_text(content: Mapping[str, Any]) -> str:
    """Canonical text: the same content always gives the same text, and different content different text."""
    content = {"manifest_version": VERSION, **content}
    checksum = xxhash.xxh3_128(json.dumps(content, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return json.dumps({**content, "checksum": checksum}, indent=1, sort_keys=True) + "\n"


def verify_manifest(folder: Path, check: Check | None = None) -> dict[str, Any]:
    """Check every file of a published folder against its manifest, and return the manifest.

    Raises CheckpointError that names the first missing, foreign, truncated or changed file with expected and found and, if
    the manifest lists its tensors, those that changed. ``check`` replaces hash_as_listed.
    """
    check = check or hash_as_listed
    content = read_manifest(folder)
    listed = content["files"]
    present = {str(path.relative_to(folder)) for path in _files(folder)} - {MANIFEST}
    for name in sorted(present - set(listed)):
        raise CheckpointError(
            f"{folder / name}: not in the manifest; remove it, since it is not part of this checkpoint."
        )
    for name, expected in listed.items():
        path = folder / name
        if name not in present:
            raise CheckpointError(f"{path}: missing; the manifest lists it with {expected['bytes']} bytes.")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path}: {size} bytes, but the manifest lists {expected['bytes']}: truncated or replaced."
            )
        check(path, expected)
    return content


def listed_files(folder: Path) -> dict[Path, Mapping[str, Any]]:
    """The manifest entry of each file of a folder; {} if it has no manifest."""
    if not (folder / MANIFEST).is_file():
        return {}
    return {folder / name: digest for name, digest in read_manifest(folder)["files"].items()}


def hash_as_listed(path: Path, listed: Mapping[str, Any] | None) -> str:
    """xxh3 of a file's content. Raises CheckpointError that names the changed tensors if it is not the listed one."""
    found = hash_file(path)
    if listed is not None and found != listed["xxh3"]:
        raise CheckpointError(
            f"{path}: checksum xxh3 {found}, but the manifest lists {listed['xxh3']}: content changed{_changed(path, listed)}."
        )
    return found


def _changed(path: Path, listed: Mapping[str, Any]) -> str:
    """The tensors of a damaged file that changed, as the end of a sentence."""
    if "tensors" not in listed:
        return ""
    wrong = [
        f"{extent['tensor']} ({extent['state']}, bytes {extent['offset']} to {extent['offset'] + extent['bytes']})"
        for extent in listed["tensors"]
        if hash_file(path, extent["offset"], extent["bytes"]) != extent["xxh3"]
    ]
    if not wrong:
        return " outside of its tensors: headers, padding or metadata"
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return f" in {', '.join(wrong[:3])}{more}"


def hash_file(path: Path, offset: int = 0, length: int | None = None) -> str:
    """xxh3 (128 bits, hexadecimal) of a file's content, or of ``length`` bytes of it from ``offset``."""
    digest = xxhash.xxh3_128()
    for block in file_blocks(path, offset, length):
        digest.update(block)
    return digest.hexdigest()


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below ``folder``, by relative path in sorted order."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(_files(folder), key=str)}


def flushed_digest(path: Path) -> dict[str, Any]:
    """Flush a file to disk. Returns its entry in a manifest: size and xxh3."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "xxh3": hash_file(path)}


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
