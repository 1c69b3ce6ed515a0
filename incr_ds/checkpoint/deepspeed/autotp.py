"""Reads DeepSpeed's own description of how AutoTP cut a parameter: strided pieces, as rectangles.

Format facts were read in DeepSpeed 0.19.8 (checkpoint/affine.py, module_inject/layers.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from incr_ds.checkpoint.deepspeed.schema import AffineParameter, AffinePiece, affine_parameters
from incr_ds.errors import CheckpointError
from incr_ds.sharding.blocks import Block

VERSION = 1


class AffineMaps:
    """The maps in one checkpoint's ``universal_checkpoint_info``; empty if there are none."""

    def __init__(self, info: Any, where: Path) -> None:
        maps = info.get("affine_map") if isinstance(info, dict) else None
        self._where = where
        self._maps: Mapping[str, AffineParameter] = {}
        if not isinstance(maps, dict) or not maps:
            return
        if maps.get("version") != VERSION:
            raise CheckpointError(
                f"{where}: its affine map has version {maps.get('version')}, but only version {VERSION} is known; update incr_ds."
            )
        self._maps = affine_parameters(maps.get("params"), where)
        self._unsupported: Mapping[str, str] = info.get("autotp_unsupported_parameter_patterns") or {}
        self._exact = {_plain(pattern): entry for pattern, entry in self._maps.items()}

    def blocks(self, parameter: str, name: str, tensor_rank: int) -> list[Block] | None:
        """The blocks of the logical tensor ``name`` in ``parameter`` on a rank, or None if no map describes them."""
        if not self._maps:
            return None
        for pattern, reason in self._unsupported.items():
            if re.match(pattern, parameter):
                raise CheckpointError(
                    f"{self._where}: {parameter}: AutoTP states that it cannot be assembled: {reason}."
                )
        entry = self._exact.get(parameter)
        if entry is None:
            return None
        held = entry["ranks"].get(tensor_rank)
        if held is None:
            raise CheckpointError(
                f"{self._where}: {parameter}: its affine map does not describe tensor rank {tensor_rank}."
            )
        shapes = tuple(entry["logical_shape"]), tuple(held["shard_shape"])
        return [self._block(name, piece, *shapes) for piece in held["pieces"] if math.prod(piece["shape"])]

    def _block(self, name: str, piece: AffinePiece, whole: tuple[int, ...], shard: tuple[int, ...]) -> Block:
        shape = tuple(piece["shape"])
        begin = self._corner(name, piece["source"], shape, whole)
        row, *columns = self._corner(name, piece["dest"], shape, shard)
        bounds = tuple((start, start + size) for start, size in zip(begin, shape, strict=True))
        return Block(name, bounds, row, columns[0] if columns else 0, float(piece.get("scale", 1.0)))

    def _corner(self, name: str, place: Any, shape: tuple[int, ...], whole: tuple[int, ...]) -> tuple[int, ...]:
        """The first element of a piece in a tensor that is stored row by row. Refuses a piece that is not a rectangle."""
        offset, strides = place
        steps = [math.prod(whole[dimension + 1 :]) for dimension in range(len(whole))]
        corner = []
        for step in steps:
            position, offset = divmod(offset, step)
            corner.append(position)
        fits = all(start + size <= limit for start, size, limit in zip(corner, shape, whole, strict=True))
        straight = all(stride == step for stride, step, size in zip(strides, steps, shape, strict=True) if size > 1)
        if len(shape) != len(whole) or not fits or not straight:
            raise CheckpointError(
                f"{self._where}: {name}: AutoTP cut it into pieces that are not rectangles, which is not supported; gather the "
                "model with save_16bit_model, or convert it with ds_to_universal."
            )
        return tuple(corner)


def _plain(pattern: str) -> str:
    """The parameter name in a pattern that matches exactly one name: ``^name$``, escaped."""
    return re.sub(r"\\(.)", r"\1", pattern.removeprefix("^").removesuffix("$"))
