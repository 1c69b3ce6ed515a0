"""Frees an engine's memory. DeepSpeed keeps ZeRO-3 models in global variables, and through them the whole engine."""

from __future__ import annotations

import functools
import gc

from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator
from torch import nn


def forget_modules(model: nn.Module) -> None:
    """Remove ``model`` and its modules from ZeRO-3's stack of modules, and empty the caches of methods that hold them."""
    own, stack = set(model.modules()), parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module not in own]
    for item in gc.get_objects():  # the cache is inside of a wrapper that gives no access to it
        if type(item) is functools._lru_cache_wrapper and item.__module__ == partitioned_param_coordinator.__name__:
            item.cache_clear()
