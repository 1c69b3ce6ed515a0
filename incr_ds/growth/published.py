"""Shapes and learning rates of published models near a size, for suggestions and advice, never as a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

from pydantic import Field

from incr_ds.config.fields import Settings, parse_settings
from incr_ds.config.yaml_file import read_yaml

SLACK = 1.1  # factor by which a shape may exceed the published extremes
NEAR = 2.5  # factor in parameters within which a published model counts as near


class _Shape(Settings):
    parameters: float = Field(gt=0.0)
    hidden: int = Field(ge=1)
    layers: int = Field(ge=1)


class _Published(Settings):
    shapes: dict[str, _Shape]
    rates: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Shapes:
    """Hidden size divided by layers of the deepest and of the widest published model near a size."""

    deepest: float
    deepest_model: str
    widest: float
    widest_model: str

    def __contains__(self, ratio: float) -> bool:
        return self.deepest / SLACK <= ratio <= self.widest * SLACK

    def __str__(self) -> str:
        return f"{self.deepest:.0f} ({self.deepest_model}) to {self.widest:.0f} ({self.widest_model})"


@dataclass(frozen=True)
class Rate:
    """The median of published peak learning rates near a size, and the models that it is the median of."""

    value: float
    of: str


def shapes_near(parameters: int) -> Shapes | None:
    """Shapes of published models near ``parameters``; None if there are fewer than two."""
    found = {
        shape.hidden / shape.layers: name
        for name, shape in _published().shapes.items()
        if _is_near(shape.parameters, parameters)
    }
    if len(found) < 2:
        return None
    return Shapes(min(found), found[min(found)], max(found), found[max(found)])


def rate_near(parameters: int) -> Rate | None:
    """The rate of published models near ``parameters``; None if there are none."""
    found: Mapping[str, list[float]] = {
        name: [rate for size, rate in pairs if _is_near(size, parameters)] for name, pairs in _published().rates.items()
    }
    rates = [rate for some in found.values() for rate in some]
    if not rates:
        return None
    of = "; ".join(f"{name} {', '.join(f'{rate:g}' for rate in some)}" for name, some in found.items() if some)
    return Rate(float(f"{median(rates):.2g}"), of)


def _is_near(one: float, other: float) -> bool:
    return 1 / NEAR <= one / other <= NEAR


@cache
def _published() -> _Published:
    path = Path(__file__).with_name("published.yaml")
    return parse_settings(read_yaml(path), _Published, str(path))
