"""Turns Megatron-DeepSpeed's fused parameters and padded vocabularies (GPTModelPipe) into logical tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from incr_ds.arch.architecture import Architecture
from incr_ds.checkpoint.assembly import Assembled, Holder, assemble_parameters
from incr_ds.checkpoint.deepspeed.rank_files import ModelRank
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import RankParameter
from incr_ds.sharding.megatron_modules import MEGATRON, check_modules, module_parameters, modules_of, padding_notes

_FUSED = re.compile(r"\d+\.self_attention\.query_key_value\.weight")


def is_megatron(parameters: Iterable[str]) -> bool:
    """Whether parameters have Megatron's names."""
    return any(_FUSED.fullmatch(parameter) for parameter in parameters)


def megatron_tensors(
    folder: Path, ranks: Sequence[ModelRank], architecture: Architecture, tensor_parallel: int
) -> Mapping[str, Assembled]:
    """Assemble every logical tensor. Rows of the vocabulary's padding belong to none.

    Raises CheckpointError that lists every parameter that is missing, unknown or of another shape.
    """
    check_modules(modules_of(MEGATRON), architecture, tensor_parallel, str(folder))
    vocabulary = _vocabulary(ranks, architecture, tensor_parallel)
    shapes = [{name: flat.shape for name, flat in rank.shards.parameters.items()} for rank in ranks]
    return fused_tensors(folder, list(zip(ranks, shapes, strict=True)), architecture, tensor_parallel, vocabulary)


def fused_tensors(
    folder: Path,
    holders: Sequence[tuple[Holder, Mapping[str, tuple[int, ...]]]],
    architecture: Architecture,
    tensor_parallel: int,
    vocabulary: int,
) -> Mapping[str, Assembled]:
    """Assemble every logical tensor from holders of parameters with their shapes; errors as in ``megatron_tensors``."""
    described = [
        (holder, shapes, _declared(architecture, tensor_parallel, holder.index % tensor_parallel, vocabulary))
        for holder, shapes in holders
    ]
    return assemble_parameters(folder, described, architecture)


def vocabulary_notes(ranks: Sequence[ModelRank], architecture: Architecture, tensor_parallel: int) -> tuple[str, ...]:
    """Notes on rows of the checkpoint that are not part of the model."""
    return padding_notes(architecture, _vocabulary(ranks, architecture, tensor_parallel))


def _vocabulary(ranks: Sequence[ModelRank], architecture: Architecture, tensor_parallel: int) -> int:
    """Number of rows of the embedding over all tensor ranks, including padding."""
    for rank in ranks:
        for parameter, flat in rank.shards.parameters.items():
            if parameter.endswith(".word_embeddings.weight"):
                found = flat.shape[0] * tensor_parallel
                if found < architecture.sizes["vocab"]:
                    raise CheckpointError(
                        f"{rank.model_file.parent}: {parameter}: {found} rows over {tensor_parallel} tensor rank(s), fewer than "
                        f"{architecture.family.axes['vocab']} {architecture.sizes['vocab']}; is config.json this checkpoint's?"
                    )
                return found
    raise CheckpointError(
        f"{ranks[0].model_file.parent}: no parameter word_embeddings.weight; a rank's files are missing."
    )


def _declared(
    architecture: Architecture, tensor_parallel: int, tensor_rank: int, vocabulary: int
) -> Mapping[str, RankParameter]:
    layers = module_parameters(modules_of(MEGATRON), architecture, tensor_parallel, tensor_rank, vocabulary)
    return {item.parameter: item for items in layers.values() for item in items}
