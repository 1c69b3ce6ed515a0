"""Types of the content of DeepSpeed's files. A file is validated once when it is opened; errors name the first wrong entry."""

from __future__ import annotations

from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic needs this one before Python 3.12
)

import torch
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from incr_ds.checkpoint.torch_file.schema import checked
from incr_ds.errors import CheckpointError


def _number(value: Any) -> Any:
    """A plain number. torch counts steps in tensors, DeepSpeed's own optimizers in ints."""
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def _one_count(value: Any) -> Any:
    """A single count. ZeRO-1 and 2 store the number of partitions per group, ZeRO-3 once."""
    counts = set(value) if isinstance(value, list | tuple) and all(isinstance(count, int) for count in value) else ()
    return next(iter(counts)) if len(counts) == 1 else value


Size = Annotated[int, Field(ge=0)]
Step = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Count = Annotated[int, BeforeValidator(_one_count), Field(ge=1)]
Shapes = dict[str, tuple[Size, ...]]
_OPEN = ConfigDict(extra="allow", arbitrary_types_allowed=True)


class ModelStates(TypedDict):
    """mp_rank_XX_model_states.pt, and zero_pp_rank_D_ before it under ZeRO-3."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    module: NotRequired[dict[str, torch.Tensor] | None]
    optimizer: NotRequired[dict[str, Any] | None]
    param_shapes: NotRequired[list[Shapes] | None]
    frozen_param_shapes: NotRequired[Shapes | None]
    frozen_param_fragments: NotRequired[dict[str, torch.Tensor] | None]
    shared_params: NotRequired[dict[str, str] | None]
    buffer_names: NotRequired[list[str] | None]
    dp_world_size: NotRequired[Size | None]
    global_steps: NotRequired[Size | None]
    global_samples: NotRequired[Size | None]
    skipped_steps: NotRequired[Size | None]
    ds_version: NotRequired[str | None]
    checkpoint_parallel_dimensions: NotRequired[dict[str, Size] | None]


class AdamState(TypedDict):
    """An optimizer's state_dict. Missing moments are reported where they are read."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    state: dict[int, dict[str, Any]]
    param_groups: list[dict[str, Any]]


class Moments(TypedDict):
    """Adam's state of a parameter or of a flat group."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: Step


class Partitions(TypedDict):
    """optimizer_state_dict of a ZeRO-1 or 2 optimizer file."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    partition_count: Count
    param_alignment_paddings: NotRequired[list[list[Size] | None] | None]
    base_optimizer_state: AdamState
    single_partition_of_fp32_groups: list[torch.Tensor]


class Stage3Partitions(TypedDict):
    """optimizer_state_dict of a ZeRO-3 optimizer file."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    partition_count: Count
    optimizer_state_dict: AdamState
    fp32_flat_groups: list[torch.Tensor]


class AffinePiece(TypedDict):
    """A strided piece of a cut parameter: offset and strides in the whole tensor and in the rank's part."""

    shape: list[Size]
    source: tuple[Size, list[Size]]
    dest: tuple[Size, list[Size]]
    scale: NotRequired[float]


class AffineShard(TypedDict):
    """The pieces that one tensor rank holds."""

    shard_shape: list[Size]
    pieces: list[AffinePiece]


class AffineParameter(TypedDict):
    """How AutoTP cut a parameter over the tensor ranks."""

    logical_shape: list[Size]
    ranks: dict[int, AffineShard]


_MODEL = TypeAdapter(ModelStates)
_ADAM = TypeAdapter(AdamState)
_MOMENTS = TypeAdapter(Moments)
_MOMENTUM = TypeAdapter(torch.Tensor, config=ConfigDict(arbitrary_types_allowed=True))
_PARTITIONS = TypeAdapter(Partitions)
_STAGE3 = TypeAdapter(Stage3Partitions)
_STEP = TypeAdapter(Step)
_AFFINE = TypeAdapter(dict[str, AffineParameter])
_MASTERS = TypeAdapter(list[list[torch.Tensor]], config=ConfigDict(arbitrary_types_allowed=True))


def model_content(content: Any, path: Path) -> ModelStates:
    """Validate a model file. Raises CheckpointError, like the other functions here, that names the first wrong entry."""
    return checked(_MODEL, content, path)


def adam_state(content: Any, path: Path, at: str) -> AdamState:
    """Validate an optimizer's state_dict, which is at ``at`` in the file."""
    return checked(_ADAM, content, path, at)


class MomentsError(Exception):
    """The reason why a checkpoint's optimizer states cannot be used, although its weights can. Its text is part of a sentence."""


def moments(content: Any, path: Path, at: str) -> Moments:
    """Validate Adam's two moments and its step.

    Raises MomentsError that names the ones that are missing and what is there instead, or states beyond Adam's. Growing only
    a part of an optimizer's state would change it silently.
    """
    known = Moments.__required_keys__
    missing = sorted(key for key in known if key not in content)
    if missing:
        found = ", ".join(map(str, content)) or "nothing: saved before the first step?"
        raise MomentsError(
            f"{path.name}: {at} has no {', '.join(missing)} (found {found}); only Adam's moments can be grown"
        )
    if more := sorted(str(key) for key in set(content) - known):
        named = "".join(f" ({optimizer})" for key, optimizer in _VARIANTS.items() if key in more)
        raise MomentsError(
            f"{path.name}: {at} has {', '.join(more)}{named} beside Adam's moments, which growth would lose"
        )
    return checked(_MOMENTS, content, path, at)


def momentum(content: Any, path: Path, at: str) -> torch.Tensor:
    """Muon's momentum of a group. Raises MomentsError unless the group's state is that alone."""
    if sorted(content) != ["momentum_buffer"]:
        found = ", ".join(map(str, content)) or "nothing: saved before the first step?"
        raise MomentsError(f"{path.name}: {at} is trained by Muon, and needs its momentum_buffer alone (found {found})")
    return checked(_MOMENTUM, content["momentum_buffer"], path, f"{at}.momentum_buffer")


# Optimizers related to Adam, by their additional state.
_VARIANTS = {"max_exp_avg_sq": "AMSGrad", "mu_product": "NAdam", "worker_error": "1-bit Adam"}


def partitions(content: Any, path: Path) -> Partitions:
    """Validate the optimizer_state_dict of a ZeRO-1, ZeRO-2 or BF16_Optimizer file."""
    return checked(_PARTITIONS, content, path, "optimizer_state_dict")


def stage3_partitions(content: Any, path: Path) -> Stage3Partitions:
    """Validate the optimizer_state_dict of a ZeRO-3 file."""
    return checked(_STAGE3, content, path, "optimizer_state_dict")


def masters(content: Any, path: Path, at: str) -> list[list[torch.Tensor]]:
    """Validate fp32 masters, by group and position in it."""
    return checked(_MASTERS, content, path, at)


def affine_parameters(content: Any, path: Path) -> dict[str, AffineParameter]:
    """Validate AutoTP's descriptions, by the pattern of a parameter's name."""
    return checked(_AFFINE, content, path, "universal_checkpoint_info.affine_map.params")


def zero_stage(content: Any, path: Path) -> int:
    """The ZeRO stage, 1 to 3, from DeepSpeed's enumeration or its stub."""
    try:
        stage = int(content)
    except (TypeError, ValueError):
        stage = -1
    if stage not in (1, 2, 3):
        raise CheckpointError(
            f"{path}: zero_stage: expected 1, 2 or 3, found {content!r}: not what DeepSpeed writes there."
        )
    return stage


def counted_steps(content: Any, path: Path) -> int:
    """Validate a number of optimizer steps in any of its types."""
    return checked(_STEP, content, path)
