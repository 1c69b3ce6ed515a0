"""Reads what all ranks share as plain data: the run's arguments, its counters, the optimizer's step.

Megatron-core stores it in common.pt, and from 0.19 on in an object among the shards. Nothing in it is run. Every class in
it, argparse.Namespace too, is replaced by a stand-in that stores its attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.megatron_core.keys import unchained
from incr_ds.checkpoint.megatron_core.metadata import Stored, attributes, read_metadata
from incr_ds.checkpoint.megatron_core.shards import Shards
from incr_ds.checkpoint.torch_file.plain import plain_content
from incr_ds.checkpoint.torch_file.validate import is_archive, named_damage, opened_archive
from incr_ds.checkpoint.torch_file.walk import StandIn
from incr_ds.config.json_file import read_json, refuse_pointer
from incr_ds.errors import CheckpointError

FILE, FORMAT_FILE = "common.pt", "metadata.json"
_OBJECT = "common_state/shard_0_1"
FORMAT = "torch_dist"
HYPERPARAMETERS = ("lr", "eps", "weight_decay")


@dataclass(frozen=True)
class Contents:
    """What an iteration's folder stores, by the keys of torch_dist, and what all ranks share, which is in ``common_file``.

    ``no_moments``: why there are none, if the format decides that.
    """

    format: str
    stored: Stored
    common: Mapping[str, Any]
    common_file: Path
    no_moments: str | None = None


def torch_dist_contents(folder: Path, shards: Shards) -> Contents:
    """What a folder of the format torch_dist stores. Raises CheckpointError if it is damaged, or has another format."""
    check_format(folder)
    stored = read_metadata(folder)
    stored = replace(stored, tensors=unchained(stored.tensors, str(folder)))
    return Contents(FORMAT, stored, *read_common(folder, stored, shards))


def read_common(folder: Path, stored: Stored, shards: Shards) -> tuple[Mapping[str, Any], Path]:
    """What all ranks share, and the file that it is in. Raises CheckpointError if that is missing or damaged."""
    place = stored.objects.get(_OBJECT)
    if place is None or (folder / FILE).is_file():
        return _mapping(_content_of(folder / FILE), folder / FILE), folder / FILE
    content, path = shards.content(place), folder / place.file
    return _mapping(content[0] if isinstance(content, list) and len(content) == 1 else content, path), path


def _mapping(content: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a mapping, found {type(content).__name__}: not what Megatron-core writes."
        )
    return content


def _content_of(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: missing; the checkpoint is incomplete. Copy the file back or use another iteration."
        )
    refuse_pointer(path)
    with named_damage(path):
        if not is_archive(path):
            raise ValueError("not an archive of torch.save")
        with opened_archive(path) as archive:
            return plain_content(path, archive)


def check_format(folder: Path) -> None:
    """Raise CheckpointError unless metadata.json says that the folder has the format torch_dist."""
    path = folder / FORMAT_FILE
    found = read_json(path, CheckpointError).get("sharded_backend")
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: sharded_backend {found!r}: only {FORMAT} can be read. Load the checkpoint with Megatron-LM and save it "
            f"with --ckpt-format {FORMAT}."
        )


def arguments(common: Mapping[str, Any]) -> Mapping[str, Any]:
    """Megatron-LM's arguments of the run, by name; {} if the file has none."""
    found = common.get("args")
    return attributes(found) if isinstance(found, StandIn) and found.name == "Namespace" else {}


def optimizer_steps(content: Any) -> Iterator[int]:
    """Every count of Adam's steps in an optimizer's state without its tensors."""
    for inner in _mappings(content):
        counts = [group.get("step") for group in _groups(inner)]
        yield from (int(count) for count in (*counts, inner.get("common_step")) if isinstance(count, int | float))


def one_step(stated: Set[int], where: Path) -> int:
    """Adam's step. Raises CheckpointError if a checkpoint with moments states none, or several."""
    if len(stated) != 1:
        found = f"several steps of Adam: {sorted(stated)[:5]}" if stated else "no step of Adam"
        raise CheckpointError(
            f"{where}: states {found}, but the checkpoint has its moments; expected one step. Use another iteration."
        )
    return next(iter(stated))


def optimizer_groups(content: Any) -> tuple[Mapping[str, Any], ...]:
    """AdamW's hyperparameters by group, from an optimizer's state without its tensors; () if a group lacks one."""
    groups = next((found for inner in _mappings(content) if (found := _groups(inner))), [])
    if not all(isinstance(group.get(name), int | float) for group in groups for name in HYPERPARAMETERS):
        return ()
    if not all(isinstance(group.get("betas"), list) and len(group["betas"]) == 2 for group in groups):
        return ()
    return tuple(
        {**{name: group[name] for name in HYPERPARAMETERS}, "betas": tuple(group["betas"])} for group in groups
    )


def _mappings(content: Any) -> Iterator[Mapping[Any, Any]]:
    """Every mapping in plain data, except the groups of an optimizer."""
    if isinstance(content, dict):
        yield content
        content = [item for key, item in content.items() if key != "param_groups"]
    if isinstance(content, list | tuple):
        for item in content:
            yield from _mappings(item)


def _groups(content: Mapping[Any, Any]) -> list[Mapping[str, Any]]:
    return [group for group in content.get("param_groups") or () if isinstance(group, dict)]
