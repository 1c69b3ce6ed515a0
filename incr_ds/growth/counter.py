"""Random numbers addressed by (seed, tensor, element): the same in any order, for any slice and number of workers."""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from incr_ds.growth.axis import Vector

IntVector = npt.NDArray[np.int64]

_WORDS_PER_BLOCK = 4  # Philox4x64 yields four 64-bit words a counter value: two elements


def normals(seed: int, name: str, first: int, count: int) -> Vector:
    """Standard normals number ``first`` to ``first + count`` of the stream (seed, name), by Box-Muller's cosine branch."""
    return _normal(_words(seed, name, first, count))


def normals_at(seed: int, name: str, first_row: int, wanted: npt.NDArray[np.bool_]) -> Vector:
    """The elements ``wanted`` [rows, width] of a matrix whose element (r, c) is number r * width + c of ``normals``.

    Rows are counted from ``first_row``. Rows and columns without a wanted element are 0. Drawing, logarithms and cosines were
    half the arithmetic of a growth, so nothing is drawn for such a row and nothing is computed for such a column.
    """
    height, width = wanted.shape
    drawn = np.zeros((height, width))
    columns = np.flatnonzero(wanted.any(axis=0))
    rows = np.flatnonzero(wanted.any(axis=1))
    for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1) if len(rows) else ():
        words = _words(seed, name, (first_row + int(run[0])) * width, len(run) * width).reshape(len(run), width, 2)
        drawn[run[0] : run[-1] + 1, columns] = _normal(words[:, columns])
    return drawn


def choices(seed: int, name: str, count: int, options: int) -> IntVector:
    """Draw ``count`` independent integers from 0 to ``options`` - 1, uniformly."""
    drawn: IntVector = (_pairs(seed, name, 0, count)[:, 0] * options).astype(np.int64)
    return drawn


def shuffled(seed: int, name: str, count: int) -> IntVector:
    """0 to ``count`` - 1 in random order."""
    order: IntVector = np.argsort(_pairs(seed, name, 0, count)[:, 0], kind="stable")
    return order


def _pairs(seed: int, name: str, first: int, count: int) -> Vector:
    """Two uniform numbers between 0 and 1 for each element from ``first`` on."""
    return _uniform(_words(seed, name, first, count))


def _words(seed: int, name: str, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Two words for each element from ``first`` on: Philox (Salmon et al., SC 2011) in counter mode."""
    begin = first // 2
    blocks = (first + count + 1) // 2 - begin
    generator = np.random.Philox(key=_key(seed, name), counter=begin)
    return generator.random_raw(blocks * _WORDS_PER_BLOCK).reshape(-1, 2)[first - 2 * begin :][:count]


def _uniform(words: npt.NDArray[np.uint64]) -> Vector:
    found: Vector = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return found


def _normal(words: npt.NDArray[np.uint64]) -> Vector:
    """A standard normal from the two words along the last dimension."""
    uniform = _uniform(words)
    drawn: Vector = np.sqrt(-2.0 * np.log(uniform[..., 0])) * np.cos(2.0 * np.pi * uniform[..., 1])
    return drawn


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
