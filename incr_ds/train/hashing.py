"""Checksums of a run's checkpoints. All ranks compute them together, each of about as many bytes.

All ranks must call these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from incr_ds.checkpoint.publish import file_sizes, flushed_digest, hash_as_listed, verify_manifest
from incr_ds.errors import CheckpointError
from incr_ds.offline.process_group import agree, shares
from incr_ds.train.ranks import all_ranks, on_every_rank, on_rank_zero

Found = TypeVar("Found")


def digests_together(
    folder: Path, what: str, remedy: str, own: Mapping[Path, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Flush every file of ``folder`` to disk and hash it. Returns the entries of a manifest by relative path, on all ranks.

    ``own`` are files that this rank has flushed and hashed already. Raises CheckpointError on all ranks, of ``what``, the
    reason and ``remedy``, if any rank fails.
    """
    mine = {str(path.relative_to(folder)): digest for path, digest in (own or {}).items()}
    known = {name: digest for found in all_ranks().gather(mine) for name, digest in found.items()}
    sizes = {name: size for name, size in on_rank_zero(lambda: file_sizes(folder)).items() if name not in known}
    attempt = partial(on_every_rank, what=what, remedy=remedy)
    return known | _spread(sizes, lambda names: {name: flushed_digest(folder / name) for name in names}, attempt)


def verify_together(folder: Path) -> None:
    """Check every file of a published folder against its manifest, as ``verify_manifest`` does.

    Raises CheckpointError on all ranks that names the first wrong file, whichever rank has hashed it.
    """
    listed = on_rank_zero(lambda: verify_manifest(folder, lambda path, entry: "")["files"])
    sizes = {name: entry["bytes"] for name, entry in listed.items()}
    damaged = _spread(sizes, lambda names: _damaged(folder, listed, names), partial(agree, all_ranks()))
    for name in listed:
        if name in damaged:
            raise CheckpointError(damaged[name])


def _spread(
    sizes: Mapping[str, int],
    work: Callable[[list[str]], dict[str, Found]],
    attempt: Callable[[Callable[[], dict[str, Found]]], dict[str, Found]],
) -> dict[str, Found]:
    """Do ``work`` for the names in ``sizes``, each on one rank, through ``attempt``. Returns what all ranks found."""
    ranks, names = all_ranks(), list(sizes)
    own = [names[number] for number in shares(list(sizes.values()), ranks.size)[ranks.rank]]
    return {name: value for found in ranks.gather(attempt(lambda: work(own))) for name, value in found.items()}


def _damaged(folder: Path, listed: Mapping[str, Mapping[str, Any]], names: Iterable[str]) -> dict[str, str]:
    """What is wrong with each file whose content is not the listed one."""
    found = {}
    for name in names:
        try:
            hash_as_listed(folder / name, listed[name])
        except CheckpointError as error:
            found[name] = str(error)
    return found
