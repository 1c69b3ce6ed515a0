"""Checks that the files of a ZeRO checkpoint belong together, in portions."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.base import LogicalCheckpoint, rounds_to, row_portions, same_numbers
from incr_ds.checkpoint.deepspeed.layer_files import layer_weights
from incr_ds.checkpoint.deepspeed.names import tag_files
from incr_ds.checkpoint.deepspeed.rank_files import ModelRank
from incr_ds.checkpoint.huggingface.reader import HuggingFaceCheckpoint, weights_file
from incr_ds.checkpoint.naming import plain_names
from incr_ds.errors import CheckpointError

_CHECKED_ELEMENTS = 1 << 18  # compared at once


def check_padding(rank: ModelRank) -> None:
    """Check that ZeRO's padding is zero. Anything else is data of another checkpoint."""
    for state in rank.shards.flat:
        for padding in rank.shards.padding(state):
            if padding.count_nonzero():
                raise CheckpointError(
                    f"{rank.model_file.parent}: {state} of model-parallel rank {rank.index}: ZeRO's padding is not zero. "
                    "Shards were swapped, or belong to another checkpoint."
                )


def check_duplicates(rank: ModelRank) -> None:
    """Check that no data-parallel rank holds the same data as the one before it.

    All groups must be equal for that, since a growth can make copies within a single one.
    """
    ranks = rank.shards.flat["weight"]
    for later in range(1, len(ranks)):
        # A rank may lack the last groups, which are frozen parameters that one rank holds.
        pairs = list(zip(ranks[later - 1], ranks[later], strict=False))
        if all(torch.equal(*pair) for pair in pairs) and any(part.any() for _, part in pairs):
            raise CheckpointError(
                f"{rank.files[later]}: holds the same weights as {rank.files[later - 1].name}; one of them is a "
                "copy of the other. Copy the right file back."
            )


def check_momentum(rank: ModelRank) -> None:
    """Check that data-parallel ranks which share a parameter that Muon trains have the same momentum of it."""
    for name, pieces in rank.shards.momentum.items():
        first, *others = rank.shards.copies(name)
        for piece, other in zip(pieces[1:], others, strict=True):
            if not same_numbers(first, other):
                raise CheckpointError(
                    f"{rank.files[piece.rank]}: {name}: its momentum_buffer is not the one in {rank.files[pieces[0].rank].name}; "
                    "each of the two holds the whole. Shards were swapped, damaged, or mixed from two checkpoints."
                )


def module_weights(folder: Path, rank: ModelRank) -> Mapping[str, torch.Tensor]:
    """Weights that DeepSpeed saved in the model's dtype beside the masters, by parameter name; {} for ZeRO-3."""
    module = rank.model.get("module")
    if rank.stage == 3:
        return {}
    if module is not None:
        return {name: tensor for name, tensor in module.items() if name in rank.names}
    layers = {int(name.split(".")[0]) for name in rank.names if name[0].isdigit()}
    tensor_rank = rank.index % max(1, tag_files(path.name for path in folder.iterdir()).tensor_ranks)
    return {name: tensor for name, tensor in layer_weights(folder, tensor_rank, layers) if name in rank.names}


def check_aliases(rank: ModelRank, modules: Mapping[str, torch.Tensor], architecture: Architecture) -> None:
    """Check that what the module saved under a tied tensor's other name equals the tensor."""
    module = rank.model.get("module") or {}
    saved = {logical: module[name] for name, logical in plain_names(module, architecture).items()}
    owners = {rank.names[name]: tensor for name, tensor in modules.items()}
    for spec in architecture.tensors:
        owner = owners.get(spec.tied_to) if spec.tied_to else None
        if owner is not None and spec.name in saved and not same_numbers(saved[spec.name], owner):
            raise CheckpointError(
                f"{rank.model_file}: tie_word_embeddings is true, but {spec.name} differs from {spec.tied_to}."
            )


def check_master(rank: ModelRank, parameter: str, saved: torch.Tensor) -> None:
    """Check that the fp32 master, cast to the module's dtype, equals the module weight bit for bit."""
    flat = rank.shards.parameters[parameter]
    if tuple(saved.shape) != flat.shape:
        raise CheckpointError(
            f"{rank.model_file}: {parameter}: module weight has shape {list(saved.shape)}, its master {list(flat.shape)}."
        )
    wrong = 0
    for ((first, stop),) in row_portions(flat.shape, _CHECKED_ELEMENTS):
        master = rank.shards.read(parameter, "weight", first, stop)
        if not rounds_to(master, saved[first:stop]):
            rounded = master.to(saved.dtype)
            wrong += int(((rounded != saved[first:stop]) & ~(rounded.isnan() & saved[first:stop].isnan())).sum())
    if wrong:
        holders = ", ".join(sorted({rank.files[piece.rank].name for piece in flat.pieces}))
        raise CheckpointError(
            f"{rank.model_file.parent}: {parameter}: {wrong} of {saved.numel()} elements of the fp32 master (in {holders}) "
            f"differ from the saved {saved.dtype} weight. Shards were swapped, damaged, or mixed from two checkpoints."
        )


def exported_weights(folder: Path, architecture: Architecture) -> HuggingFaceCheckpoint | None:
    """Open the weights of the same step that transformers' Trainer saved beside DeepSpeed's folder; None if there are none."""
    if not (folder / "trainer_state.json").is_file() or weights_file(folder) is None:
        return None
    return HuggingFaceCheckpoint(folder, architecture)


def check_exported(checkpoint: LogicalCheckpoint, exported: LogicalCheckpoint, name: str) -> None:
    """Check that a tensor that the Trainer exported equals the fp32 master, cast to its dtype."""
    spec = checkpoint.architecture.by_name[name]
    for part in row_portions(spec.shape, _CHECKED_ELEMENTS):
        saved = exported.read(name, "weight", part)
        if not rounds_to(checkpoint.read(name, "weight", part), saved):
            raise CheckpointError(
                f"{exported.facts.path}: {name}: the weights exported there are not the fp32 masters in "
                f"{checkpoint.facts.path.name}. Shards were swapped or damaged, or the two are of different steps."
            )
