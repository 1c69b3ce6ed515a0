"""The packages of the optional extras, and what a user reads where one of them is missing."""

from __future__ import annotations

from importlib.util import find_spec

from incr_ds.errors import ConfigError

# Extra of setup.py: its modules, and the package that has each.
EXTRAS = {
    "train": {
        "deepspeed": "deepspeed",
        "megatron.core": "megatron-core",
        "tensorboard": "tensorboard",
        "matplotlib": "matplotlib",
    },
    "data": {"pyarrow": "pyarrow", "zstandard": "zstandard"},
    "eval": {"lm_eval": "lm-eval"},
    "wandb": {"wandb": "wandb"},
}


def require(*modules: str) -> None:
    """Raise ConfigError unless ``modules``, which EXTRAS names, are installed. Imports none of them."""
    if missing := [module for module in modules if not _is_installed(module)]:
        raise _missing(missing)


def missing_package(error: ModuleNotFoundError) -> ConfigError | None:
    """What to say of a failed import; None if the module belongs to no package of an extra."""
    root = (error.name or "").partition(".")[0]
    missing = [module for modules in EXTRAS.values() for module in modules if module.partition(".")[0] == root]
    return _missing(missing) if missing else None


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _missing(modules: list[str]) -> ConfigError:
    found = [(extra, known[module]) for module in modules for extra, known in EXTRAS.items() if module in known]
    extras, packages = dict.fromkeys(extra for extra, _ in found), [package for _, package in found]
    verb = "is" if len(packages) == 1 else "are"
    return ConfigError(f"{' and '.join(packages)} {verb} not installed; run pip install 'incr_ds[{','.join(extras)}]'.")
