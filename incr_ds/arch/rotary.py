"""How fast each rotary pair of a head rotates, as transformers computes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# Their frequencies depend on the config alone, not on the length of a sequence.
STEADY = ("default", "linear", "llama3", "yarn")
ROPE_TYPES = (*STEADY, "dynamic", "longrope")
BASIC = ("rope_theta", "partial_rotary_factor")  # that every kind of rope_parameters has


def rotary_kinds(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rope_parameters of every kind of layer; a single entry if all layers share them."""
    rope = config.get("rope_parameters") or {}
    return [rope] if "rope_type" in rope else [kind for kind in rope.values() if isinstance(kind, dict)]


def rotary_frequencies(config: Mapping[str, Any]) -> tuple[npt.NDArray[np.float64], float]:
    """Radians per position of each pair, [head_dim / 2], and the factor on sine and cosine, for a STEADY kind."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = config["rope_parameters"]
    if rope["rope_type"] == "default":
        exponents = np.arange(0, config["head_dim"], 2, dtype=np.float64) / config["head_dim"]
        return rope["rope_theta"] ** -exponents, 1.0
    given = {key: value for key, value in config.items() if key != "model_type"}
    full = AutoConfig.for_model(config["model_type"], **given)
    frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](full, device="cpu")
    return frequencies.double().numpy(), float(factor)
