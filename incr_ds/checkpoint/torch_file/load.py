"""Loads DeepSpeed's .pt files safely: only tensors and plain containers, mapped from disk, with no code run."""

from __future__ import annotations

import pickle
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from incr_ds.checkpoint.torch_file.validate import check_outline, damaged
from incr_ds.config.json_file import refuse_pointer
from incr_ds.errors import CheckpointError

# The classes that DeepSpeed itself pickles into optimizer files, and those in the arguments and random states that
# Megatron-DeepSpeed saves beside the model. Each is replaced by a stub that only holds attributes, so nothing of them need be
# installed, and nothing runs.
INERT_TYPES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.checkpoint.universal_checkpoint.SubparamShape",
    "argparse.Namespace",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
)

_LIST = threading.Lock()  # one thread at a time changes torch's list; opening a mapped file takes milliseconds


class Stub:
    """Replaces a DeepSpeed class. It stores the arguments that it was built from and does nothing."""

    def __init__(self, *arguments: Any, **_: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __int__(self) -> int:
        return int(self.arguments[0])


Allowed = Sequence[
    Callable[..., Any] | tuple[Callable[..., Any], str]
]  # as torch.serialization.safe_globals takes them


def stubs_alone() -> AbstractContextManager[None]:
    """A context in which torch.load allows only the stubs."""
    return _only([(Stub, name) for name in INERT_TYPES])


@contextmanager
def _only(allowed: Allowed) -> Iterator[None]:
    """A context in which torch.load allows only these types.

    torch's list belongs to the whole process, and other packages add to it: megatron-core allows numpy's own functions,
    which would then run instead of their stubs.
    """
    with _LIST:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(list(allowed))
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def load_pt(path: Path, *, trust: bool = False) -> Any:
    """Load a .pt file with its tensors mapped from disk.

    Reads only tensors, containers and a few types of DeepSpeed, as stubs. Raises CheckpointError if the file is missing,
    damaged, or refers to any other global. ``trust`` unpickles without that limit, which runs any code that the file's
    author put there.
    """
    _check_before_loading(path)
    with _named_failures(path), stubs_alone():
        return torch.serialization.load(path, map_location="cpu", mmap=True, weights_only=not trust)


def load_pt_of(path: Path, types: Allowed) -> Any:
    """Load a .pt file into memory with real objects of ``types``, and of no other types.

    For a library that needs its own objects. Fails like ``load_pt``.
    """
    _check_before_loading(path)
    with _named_failures(path), _only(types):
        return torch.serialization.load(path, map_location="cpu", weights_only=True)


def _check_before_loading(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the checkpoint is incomplete. Copy the file back or use another tag.")
    refuse_pointer(path)
    check_outline(path)
    _check_own_name(path)


@contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """A context that turns torch.load's errors into a CheckpointError that explains what is wrong with the file."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path)) from error
    except Exception as error:  # a damaged pickle raises many kinds of errors
        raise CheckpointError(damaged(path, error)) from error


def _check_own_name(path: Path) -> None:
    """Check the file's name. torch.save names the archive's inner folder after the file, so swapped shards show."""
    with zipfile.ZipFile(path) as archive:
        written_as = archive.namelist()[0].partition("/")[0]
    if written_as.endswith("_states") and written_as != path.stem:
        raise CheckpointError(
            f"{path}: was written as {written_as}.pt: shards were swapped, or copied over another rank's. Copy the right "
            "file back."
        )


def _refusal(path: Path) -> str:
    try:
        foreign = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - set(INERT_TYPES))
    except Exception:  # the pickle is damaged as well; it is refused in any case
        foreign = []
    named = ", ".join(foreign) or "an object that is not a tensor or a container"
    return (
        f"{path}: refers to {named}; loading it would run code from the checkpoint, so it was refused. If you trust the "
        "author of this file, repeat with --trust."
    )
