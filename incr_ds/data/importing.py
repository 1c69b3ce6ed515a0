"""Imports without torch's compiler, whose own import takes two seconds on every rank.

megatron-core and DeepSpeed decorate functions with torch.compile where they define them: fused layers and the Muon
optimizer. None of them runs in a process of this project, so that they need not be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_compiler() -> Iterator[None]:
    """A context in which torch.compile returns a function as it is."""

    def unchanged(function: Callable[..., Any] | None = None, **_: Any) -> Any:
        return unchanged if function is None else function

    whole, torch.compile = torch.compile, unchanged  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = whole
