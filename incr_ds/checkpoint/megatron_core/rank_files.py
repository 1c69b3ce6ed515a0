"""Opens the files of Megatron-LM's format torch: mp_rank_TT[_PPP]/model_optim_rng.pt, one for each model-parallel rank.

Names and content were read in Megatron-LM (megatron/training/checkpointing.py, 2026-08-22).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.base import FLOATING
from incr_ds.checkpoint.torch_file.extents import FileTensor, content_with_extents
from incr_ds.errors import CheckpointError

FILE, DISTRIBUTED_FILE = "model_optim_rng.pt", "distrib_optim.pt"
EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_FOLDER = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,4}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_FIRST_VERSION = 2.0  # of checkpoints in which q, k and v of a group lie together
_OTHER_FORMAT = "Load the checkpoint with Megatron-LM and save it with --ckpt-format torch_dist."


@dataclass(frozen=True)
class RankFile:
    """The file of one tensor rank of one pipeline stage. ``parameters`` are the model's, in the order of its modules.

    Their names have the numbers of layers in the whole model. ``content`` is everything else.
    """

    path: Path
    tensor_rank: int
    stage: int
    parameters: Mapping[str, FileTensor]
    content: Mapping[str, Any]

    @property
    def num_layers(self) -> int:
        """Number of its decoder layers."""
        return len(_layers(self.parameters))


def rank_folder(rank: int, stage: int, stages: int) -> str:
    """Name of the folder of a tensor rank and a stage."""
    return f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")


def open_rank_files(folder: Path) -> tuple[tuple[RankFile, ...], tuple[int, int]]:
    """The files of all ranks, stage by stage, and the tensor- and pipeline-parallel degrees.

    Raises CheckpointError if a rank's file is missing, or holds anything but one GPTModel of Megatron-core.
    """
    paths = _grid(folder)
    degrees = (1 + max(rank for rank, _ in paths), 1 + max(stage for _, stage in paths))
    found: list[RankFile] = []
    for stage in range(degrees[1]):
        before = sum(rank.num_layers for rank in found if rank.tensor_rank == 0)
        found += [_opened(paths[rank, stage], rank, stage, before) for rank in range(degrees[0])]
    return tuple(found), degrees


def _grid(folder: Path) -> Mapping[tuple[int, int], Path]:
    """The file of each tensor rank and stage."""
    entries = sorted(entry for entry in folder.glob("mp_rank_*") if entry.is_dir())
    matches = {entry: _FOLDER.fullmatch(entry.name) for entry in entries}
    foreign = [entry.name for entry, match in matches.items() if match is None]
    if foreign or not entries:
        found = ", ".join(foreign[:3]) or "none"
        raise CheckpointError(
            f"{folder}: expected folders mp_rank_TT or mp_rank_TT_PPP, for tensor ranks and pipeline stages, found {found}; "
            f"the ranks of experts cannot be read. {_OTHER_FORMAT}"
        )
    paths = {(int(match[1]), int(match[2] or 0)): entry / FILE for entry, match in matches.items() if match}
    ranks, stages = (1 + max(place[axis] for place in paths) for axis in (0, 1))
    missing = [
        rank_folder(rank, stage, stages)
        for stage in range(stages)
        for rank in range(ranks)
        if (rank, stage) not in paths
    ]
    if missing:
        raise CheckpointError(
            f"{folder}: missing {', '.join(missing[:5])} of {ranks} tensor ranks x {stages} pipeline stages. Copy the folders "
            "back, or use another iteration."
        )
    return paths


def _opened(path: Path, rank: int, stage: int, layers_before: int) -> RankFile:
    content = content_with_extents(path)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a mapping, found {type(content).__name__}: not what Megatron-LM writes."
        )
    if "model0" in content:
        raise CheckpointError(
            f"{path}: holds several model chunks of an interleaved pipeline, which cannot be read. {_OTHER_FORMAT}"
        )
    version = content.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < _FIRST_VERSION:
        raise CheckpointError(
            f"{path}: checkpoint_version {version!r:.40}: q, k and v lie in another order before {_FIRST_VERSION}. "
            f"{_OTHER_FORMAT}"
        )
    saved = content.get("model")
    if not isinstance(saved, dict) or "language_model" in saved:
        raise CheckpointError(
            f"{path}: model: not a GPTModel of Megatron-core, but an older one (--use-legacy-models), or none. {_OTHER_FORMAT}"
        )
    parameters = {_global(str(name), layers_before): _plain(name, value, path) for name, value in saved.items()}
    kept = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    return RankFile(path, rank, stage, kept, {key: value for key, value in content.items() if key != "model"})


def _plain(name: Any, value: Any, path: Path) -> FileTensor | None:
    """A parameter; None for the state of a module of Transformer Engine."""
    if str(name).endswith("_extra_state"):
        return None
    if not isinstance(value, FileTensor) or value.dtype not in FLOATING:
        found = getattr(value, "name", type(value).__name__)
        raise CheckpointError(
            f"{path}: {name}: expected a tensor of 16, 32 or 64 bits, found {found:.40}. Save the checkpoint in bf16."
        )
    return value


def _global(name: str, layers_before: int) -> str:
    """A parameter's name with its layer's number in the whole model."""
    match = _LAYER.fullmatch(name)
    return f"decoder.layers.{int(match[1]) + layers_before}.{match[2]}" if match else name


def _layers(names: Mapping[str, Any]) -> set[str]:
    return {match[1] for name in names if (match := _LAYER.fullmatch(name))}
