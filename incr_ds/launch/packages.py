"""The packages of the extras, and what a user reads where one of them is missing."""

from __future__ import annotations

from importlib.util import find_spec

from incr_ds.errors import ConfigError

# Module: the package that has it. setup.py installs them with the extra ``train``.
TRAINING = {
    "deepspeed": "deepspeed",
    "megatron.core": "megatron-core",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
}
# Module: its package, and the extra that installs it.
OPTIONAL = {"lm_eval": ("lm-eval", "eval"), "wandb": ("wandb", "wandb")}


def require(*modules: str) -> None:
    """Raise ConfigError unless ``modules``, which TRAINING or OPTIONAL name, are installed. Imports none of them."""
    if missing := [module for module in modules if not _is_installed(module)]:
        raise _missing(missing)


def missing_training_package(error: ModuleNotFoundError) -> ConfigError | None:
    """What to say of a failed import; None if the module belongs to no package of the extra ``train``."""
    root = (error.name or "").partition(".")[0]
    missing = [module for module in TRAINING if module.partition(".")[0] == root]
    return _missing(missing) if missing else None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _missing(modules: list[str]) -> ConfigError:
    packages = " and ".join(TRAINING.get(module) or OPTIONAL[module][0] for module in modules)
    extras = ",".join(dict.fromkeys("train" if module in TRAINING else OPTIONAL[module][1] for module in modules))
    verb = "is" if len(modules) == 1 else "are"
    return ConfigError(f"{packages} {verb} not installed; run pip install 'incr_ds[{extras}]'.")
