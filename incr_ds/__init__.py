"""incr_ds: grow a trained language model into a larger one and continue pre-training it under DeepSpeed.

The names below are the package's public surface. Each is imported when it is first used, so ``import incr_ds`` itself
needs no torch, no DeepSpeed and no GPU.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "GrowthRecipe": "incr_ds.config.growth",
    "GrowthRequest": "incr_ds.offline.plan",
    "IncrError": "incr_ds.errors",
    "compare": "incr_ds.offline.compare",
    "distillation_loss": "incr_ds.losses.distillation",
    "export_huggingface": "incr_ds.checkpoint.huggingface.export",
    "grow_checkpoint": "incr_ds.offline.run",
    "open_source": "incr_ds.checkpoint.opening",
    "plan_growth": "incr_ds.growth.planner",
    "plan_request": "incr_ds.offline.plan",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'incr_ds' has no attribute {name!r}; its public names: {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
