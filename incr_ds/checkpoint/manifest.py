"""Types of a manifest and of a growth's journal. A checksum only proves that the content is what somebody wrote."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from incr_ds.errors import CheckpointError

VERSION = 2


def _below(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError("not the path of a file below the folder")
    return name


Size = Annotated[int, Field(ge=0)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
RelativePath = Annotated[str, AfterValidator(_below)]
_CLOSED = ConfigDict(strict=True, extra="forbid")
_OPEN = ConfigDict(strict=True, extra="allow")


@with_config(_CLOSED)
class Extent(TypedDict):
    """A range of bytes that holds elements of a tensor's weight or moment."""

    tensor: str
    state: Literal["weight", "exp_avg", "exp_avg_sq", "momentum_buffer"]
    offset: Size
    bytes: Size
    xxh3: Hash


@with_config(_CLOSED)
class ListedFile(TypedDict):
    """Size and checksum of a file, and of the tensors in it if they are known."""

    bytes: Size
    xxh3: Hash
    tensors: NotRequired[list[Extent]]


@with_config(_OPEN)
class Facts(TypedDict):
    """How the folder was made: the entries that this package reads."""

    recipe: NotRequired[dict[str, Any]]
    function_preserving: NotRequired[bool]
    notes: NotRequired[list[str]]
    target: NotRequired[dict[str, Any]]
    layout: NotRequired[dict[str, Any]]
    tag: NotRequired[str]
    position: NotRequired[dict[str, Any]]
    evaluated_step: NotRequired[int]
    data: NotRequired[dict[str, Any]]
    settings: NotRequired[dict[str, Any]]


@with_config(_OPEN)
class Manifest(TypedDict):
    """manifest.json; docs/manifest.md describes it."""

    checksum: Hash
    manifest_version: Literal[2]
    kind: str
    versions: NotRequired[dict[str, str]]
    facts: Facts
    files: dict[RelativePath, ListedFile]


@with_config(_CLOSED)
class JournalEntry(TypedDict):
    """One line of a growth's journal: a file that is safely on disk."""

    path: RelativePath
    digest: ListedFile


_MANIFEST, _ENTRY = TypeAdapter(Manifest), TypeAdapter(JournalEntry)


def check_manifest(content: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError that names the first entry of a manifest that is missing or of the wrong type."""
    try:
        _MANIFEST.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in first["loc"])
        found = "" if first["type"] == "missing" else f", found {first['input']!r:.80}"
        raise CheckpointError(
            f"{path}: {where}: {first['msg']}{found}: not what incr_ds writes there, although the checksum matches."
        ) from error


def journal_entry(line: str) -> JournalEntry | None:
    """Parse a line of a journal. Returns None if it is cut off or was not written by a growth."""
    try:
        return _ENTRY.validate_json(line)
    except ValidationError:
        return None
