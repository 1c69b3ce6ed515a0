"""Whether the matrices of a layer's experts are multiplied by one grouped product or one after the other."""

from __future__ import annotations

from typing import Literal

from incr_ds.arch.architecture import Architecture
from incr_ds.errors import ConfigError
from incr_ds.sharding.placement import split_bounds

ExpertProducts = Literal["auto", "grouped", "eager"]

_ALIGNED = 16  # bytes: torch.nn.functional.grouped_mm wants every row of a matrix to start at a multiple of it
_ELEMENTS = (2, 4)  # bytes of the numbers that it multiplies


def grouped_experts(products: ExpertProducts, architecture: Architecture, tensor_parallel: int, element: int) -> bool:
    """Whether a layer's experts are computed by grouped products, in numbers of ``element`` bytes.

    ``auto`` groups them if their sizes allow it on every tensor rank. A dense model has none. Raises ConfigError if
    ``grouped`` is asked for and cannot be.
    """
    if "experts" not in architecture.sizes:
        if products != "auto":
            raise ConfigError(
                f"model.experts: {products}: a {architecture.family.model_type} has no experts, since it is not a mixture of "
                "experts; remove it."
            )
        return False
    obstacle = _obstacle(architecture, tensor_parallel, element)
    if products == "grouped" and obstacle:
        raise ConfigError(f"model.experts: grouped: {obstacle}; set auto or eager, or choose other sizes.")
    return products != "eager" and not obstacle


def _obstacle(architecture: Architecture, tensor_parallel: int, element: int) -> str:
    """Why grouped products refuse the model's sizes; empty if they take them."""
    if element not in _ELEMENTS:
        return f"grouped products have no numbers of {element} bytes"
    fields, sizes = architecture.family.axes, architecture.sizes
    neurons = {stop - start for start, stop in split_bounds(sizes["ffn"], tensor_parallel)}
    for field, share in [(fields["hidden"], sizes["hidden"]), *((fields["ffn"], share) for share in sorted(neurons))]:
        if share * element % _ALIGNED:
            cut = f" on a tensor rank of {tensor_parallel}" if share not in (sizes["hidden"], sizes["ffn"]) else ""
            return (
                f"{field} {share}{cut} is not a multiple of {_ALIGNED // element}, and rows of numbers of {element} bytes must "
                f"fill multiples of {_ALIGNED} bytes"
            )
    return ""
