"""Megatron-LM's formats fsdp_dtensor and torch_dcp, with their keys as those of torch_dist.

torch.distributed.checkpoint stores both without Megatron-core's own library: every tensor in its whole shape under a key of
its own, the parts of it that ranks have as chunks, and every setting as an object. Facts: megatron-core 0.16 and 0.19
(transformer/fsdp_dtensor_checkpoint.py, optimizer/distrib_optimizer.py), and Megatron-LM's training/checkpointing.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from incr_ds.checkpoint.megatron_core.common import FORMAT, FORMAT_FILE, HYPERPARAMETERS, Contents, arguments
from incr_ds.checkpoint.megatron_core.keys import MOMENT_PREFIXES, OF_DISTRIBUTED_OPTIMIZER, OF_OPTIMIZER
from incr_ds.checkpoint.megatron_core.metadata import FILE, Place, Stored, StoredTensor, read_metadata
from incr_ds.checkpoint.megatron_core.shards import Shards
from incr_ds.errors import CheckpointError

Format = Literal["fsdp_dtensor", "torch_dcp"]
_STATES = "|".join(
    prefix.split(".")[2] for prefix in (*MOMENT_PREFIXES.values(), OF_DISTRIBUTED_OPTIMIZER, OF_OPTIMIZER)
)
# Keys, and those of torch_dist for them. A parameter is named as in the model, after a "module." for each wrapper around it.
_KEYS: Mapping[Format, Mapping[str, str]] = {
    "fsdp_dtensor": {
        r"model\.(?:module\.)+(.+)": r"\1",
        rf"optimizer\.state\.(?:module\.)+(.+)\.({_STATES})": r"optimizer.state.\2.\1",
    },
    "torch_dcp": {r"model\.(.+)": r"\1"},
}
_OF_FSDP_DTENSOR = "model.module."
# Degrees under which several ranks have other values for a key. One of these is stored.
_COLLIDING: Mapping[Format, tuple[str, ...]] = {
    "fsdp_dtensor": ("pipeline_model_parallel_size",),
    "torch_dcp": ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"),
}
_UNSCALED = {"float32", "bfloat16"}  # fused Adam divides moments of other types by scales, which are not stored
_SETTING = re.compile(
    rf"optimizer\.(param_to_group_meta\..+|param_groups\.\d+)\.({'|'.join((*HYPERPARAMETERS, 'betas', 'step'))})"
)
_SHARED = ("args", "iteration")
_STEP = re.compile(r"optimizer\.state\..+\.step")


def dtensor_contents(folder: Path, shards: Shards) -> Contents:
    """What a folder with .metadata and without metadata.json stores.

    Raises CheckpointError if it has neither of the two formats, or if its degrees do not allow it to be read.
    """
    stored, where = read_metadata(folder), folder / FILE
    name = _format(stored, folder)
    common = _common(stored, shards)
    for degree in _COLLIDING[name]:
        found = arguments(common).get(degree, 1)
        if found != 1:
            raise CheckpointError(
                f"{where}: args.{degree}: {found}, and with --ckpt-format {name} these ranks store different values under the "
                f"same keys, so that one rank's are left. Save the checkpoint with --ckpt-format {FORMAT}."
            )
    tensors = _renamed(stored.tensors, name, where)
    reason = _why_no_moments(tensors, name)
    if reason:
        tensors = {key: tensor for key, tensor in tensors.items() if not _is_moment(key)}
    return Contents(name, replace(stored, tensors=tensors), common, where, reason)


def _format(stored: Stored, folder: Path) -> Format:
    if any(key.startswith(_OF_FSDP_DTENSOR) for key in stored.tensors):
        return "fsdp_dtensor"
    if any(key.startswith("model.") for key in stored.tensors):
        return "torch_dcp"
    raise CheckpointError(
        f"{folder}: {FILE} without {FORMAT_FILE}, and no key starts with 'model.', as all do that --ckpt-format fsdp_dtensor "
        f"and torch_dcp save; a checkpoint of {FORMAT} was not saved completely. Use another iteration."
    )


def _renamed(tensors: Mapping[str, StoredTensor], name: Format, where: Path) -> Mapping[str, StoredTensor]:
    """The tensors of the model and of the optimizer by torch_dist's keys. Others are the states of random generators."""
    found: dict[str, StoredTensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(("model.", "optimizer.")):
            continue
        matches = ((re.fullmatch(pattern, key), other) for pattern, other in _KEYS[name].items())
        other = next((match.expand(template) for match, template in matches if match), key)
        if other in found:
            raise CheckpointError(
                f"{where}: {key}: another key names the same parameter {other}; expected one. The checkpoint is of several "
                "models, or is damaged."
            )
        found[other] = tensor
    return found


def _why_no_moments(tensors: Mapping[str, StoredTensor], name: Format) -> str | None:
    if name == "torch_dcp" and any(key.startswith("optimizer.") for key in tensors):
        return "torch_dcp numbers the parameters in the optimizer's state, and does not state their order"
    scaled = {tensor.dtype for key, tensor in tensors.items() if _is_moment(key)} - _UNSCALED
    if scaled:
        return f"the moments are saved as {', '.join(sorted(scaled))}, without the scales that belong to them"
    return None


def _is_moment(key: str) -> bool:
    return key.startswith(tuple(MOMENT_PREFIXES.values()))


def _common(stored: Stored, shards: Shards) -> Mapping[str, Any]:
    """Arguments, iteration and the optimizer's settings, as torch_dist's common.pt has them."""
    scalars = dict(_scalars(stored))
    found: dict[str, Any] = {name: shards.content(scalars[name]) for name in _SHARED if name in scalars}
    groups: dict[str, dict[str, Any]] = {}
    steps: set[Any] = set()
    for key, place in scalars.items():
        if match := _SETTING.fullmatch(key):
            groups.setdefault(match[1], {})[match[2]] = shards.content(place)
        elif _STEP.fullmatch(key):
            steps.add(shards.content(place))
    distinct: list[Mapping[str, Any]] = []
    for group in groups.values():
        distinct += [] if group in distinct else [group]
    return {**found, "optimizer": {"param_groups": distinct, "state": [{"common_step": step} for step in steps]}}


def _scalars(stored: Stored) -> Iterator[tuple[str, Place]]:
    """The place of every object, and of every tensor of one element: a step is one or the other."""
    yield from stored.objects.items()
    for key, tensor in stored.tensors.items():
        if math.prod(tensor.shape) == 1:
            yield key, tensor.chunks[0].place
