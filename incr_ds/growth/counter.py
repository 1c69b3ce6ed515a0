"""Random numbers addressed by (seed, tensor, element): the same whatever the order, slice or number of workers."""

from __future__ import annotations

import hashlib

import numpy as np

from incr_ds.growth.axis import Vector

_WORDS_PER_BLOCK = 4  # Philox4x64 yields four 64-bit words a counter value: two normals


def normals(seed: int, name: str, first: int, count: int) -> Vector:
    """Standard normals number ``first`` to ``first + count`` of the stream (seed, name).

    Philox (Salmon et al., SC 2011) in counter mode; each normal is Box and Muller's cosine branch of two words.
    """
    begin = first // 2
    blocks = (first + count + 1) // 2 - begin
    generator = np.random.Philox(key=_key(seed, name), counter=begin)
    words = generator.random_raw(blocks * _WORDS_PER_BLOCK).reshape(-1, 2)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    drawn: Vector = np.sqrt(-2.0 * np.log(uniform[:, 0])) * np.cos(2.0 * np.pi * uniform[:, 1])
    return drawn[first - 2 * begin :][:count]


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest(), "little")
