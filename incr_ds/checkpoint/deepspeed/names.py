"""Names of the files in a tag's folder, written and recognized by one template each.

Read in DeepSpeed 0.19.8 (runtime/engine.py, runtime/pipe/module.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_MODEL = "mp_rank_{model:02d}_model_states.pt"
_ZERO_3_MODEL = "zero_pp_rank_{data}_mp_rank_{model:02d}_model_states.pt"
_OPTIMIZER = "zero_pp_rank_{data}_mp_rank_{model:02d}_optim_states.pt"
_LAYER = "layer_{layer:02d}-model_{tensor:02d}-model_states.pt"
# Before the name of an optimizer file, by the dtype of the model's weights.
OPTIMIZER_PREFIXES = {"float32": "", "bfloat16": "bf16_", "float16": ""}
ANY_MODEL_FILE = "mp_rank_XX_model_states.pt"  # for messages


def model_file(model_rank: int, data_rank: int | None = None) -> str:
    """The model file of a model-parallel rank; under ZeRO-3 there is one for each data-parallel rank."""
    if data_rank is None:
        return _MODEL.format(model=model_rank)
    return _ZERO_3_MODEL.format(data=data_rank, model=model_rank)


def optimizer_file(model_rank: int, data_rank: int, dtype: str = "float32") -> str:
    """The optimizer file of a rank whose model's weights are stored in ``dtype``."""
    return OPTIMIZER_PREFIXES[dtype] + _OPTIMIZER.format(data=data_rank, model=model_rank)


def layer_file(layer: int, tensor_rank: int) -> str:
    """The file of a pipeline layer's weights on one tensor rank."""
    return _LAYER.format(layer=layer, tensor=tensor_rank)


@dataclass(frozen=True)
class TagFiles:
    """The files of a tag's folder by what they hold: keys are model-parallel rank, (model-parallel rank, data-parallel rank)
    or (layer, tensor rank)."""

    models: Mapping[int, str]
    zero_3_models: Mapping[tuple[int, int], str]
    optimizers: Mapping[tuple[int, int], str]
    layers: Mapping[tuple[int, int], str]

    @property
    def tensor_ranks(self) -> int:
        """Number of tensor ranks that have layer files; 0 without a pipeline."""
        return len({tensor for _, tensor in self.layers})


def tag_files(names: Iterable[str]) -> TagFiles:
    """Sort the names of a folder's files; others are left out."""
    names = list(names)
    optimizer = rf"(?:{'|'.join((*OPTIMIZER_PREFIXES.values(), 'fp16_'))})" + _pattern(_OPTIMIZER)
    return TagFiles(
        {int(match["model"]): match[0] for match in _matches(_pattern(_MODEL), names)},
        {(int(match["model"]), int(match["data"])): match[0] for match in _matches(_pattern(_ZERO_3_MODEL), names)},
        {(int(match["model"]), int(match["data"])): match[0] for match in _matches(optimizer, names)},
        {(int(match["layer"]), int(match["tensor"])): match[0] for match in _matches(_pattern(_LAYER), names)},
    )


def _pattern(template: str) -> str:
    return re.sub(r"\{(\w+)(?::02d)?\}", r"(?P<\1>\\d+)", template.replace(".", r"\."))


def _matches(pattern: str, names: list[str]) -> list[re.Match[str]]:
    return [match for name in names if (match := re.fullmatch(pattern, name))]
