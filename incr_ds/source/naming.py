"""Parameter names of training modules back to logical (Hugging Face) names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from incr_ds.arch.architecture import Architecture

_PIPELINE = re.compile(r"(?:tied_modules\.[^.]+|(?P<index>\d+))\.(?:block\.)?(?P<local>.+)")


def logical_names(parameters: Iterable[str], architecture: Architecture) -> Mapping[str, str]:
    """Map each parameter name of a rank to its logical name; an unknown one maps to itself.

    A plain engine's names are logical already. A pipeline's are ``<pipeline layer>.block.<local>`` for decoder layers
    (layer 0 is the embedding) and ``<pipeline layer>.<local>`` or ``tied_modules.<key>.<local>`` for the others.
    """
    outside = {spec.local_name: spec.name for spec in architecture.stored if spec.layer is None}
    inside: dict[tuple[int | None, str], str] = {
        (spec.layer, spec.local_name): spec.name for spec in architecture.stored if spec.layer is not None
    }
    named = {}
    for parameter in parameters:
        match = _PIPELINE.fullmatch(parameter)
        if match is None:
            named[parameter] = parameter
            continue
        layer = int(match["index"]) - 1 if match["index"] else None
        named[parameter] = inside.get((layer, match["local"]), outside.get(match["local"], parameter))
    return named
