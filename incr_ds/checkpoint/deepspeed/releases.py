"""Releases of DeepSpeed whose loaders differ in ways that affect a written checkpoint."""

from __future__ import annotations

import re

from incr_ds.errors import LayoutError

TESTED = "0.19.8"
OLDEST = (0, 16, 9)
# Until 0.19.2 the ZeRO-3 loader of universal checkpoints expects a bare tensor where the others expect a dictionary
# (runtime/zero/stage3.py, load_hp_checkpoint_state). From 0.19.3 on it accepts both, so that one folder serves all stages.
UNION_SINCE = (0, 19, 3)
# That of 0.16.9 restored only one parameter group, cut by the rank within a node (DeepSpeed's pull request 7601).
# Releases between the two are treated the same.
ZERO3_UNIVERSAL_SINCE = (0, 18, 4)


def needs_bare_states(version: str, universal: bool, zero_stage: int) -> bool:
    """Whether the states of a universal checkpoint must be bare tensors for this release.

    Raises LayoutError for an invalid version, one that is too old to be known, or one that loads this checkpoint wrongly.
    """
    release = _release(version)
    if release < OLDEST:
        raise LayoutError(
            f"--target-deepspeed {version}: the loaders of releases before {_text(OLDEST)} are not known; use a newer one."
        )
    if not universal or zero_stage != 3 or release >= UNION_SINCE:
        return False
    if release < ZERO3_UNIVERSAL_SINCE:
        raise LayoutError(
            f"--target-deepspeed {version}: its ZeRO-3 loader of universal checkpoints restores one parameter group only, and "
            f"the wrong share on more than one node; use {_text(ZERO3_UNIVERSAL_SINCE)} or newer, or layout.format: deepspeed."
        )
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if match is None:
        raise LayoutError(f"--target-deepspeed {version!r}: expected a release such as {TESTED}.")
    return tuple(int(part) for part in match.groups())


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
