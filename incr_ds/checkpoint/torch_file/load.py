"""Safe loading of DeepSpeed's .pt files: tensors and plain containers only, mapped from disk, nothing executed."""

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
    """Stands in for a DeepSpeed class; keeps what it was built from, does nothing."""

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
    """Inside, torch.load allows the stubs and nothing else."""
    return _only([(Stub, name) for name in INERT_TYPES])


@contextmanager
def _only(allowed: Allowed) -> Iterator[None]:
    """Inside, torch.load allows these types and nothing else.

    Its list belongs to the whole process, and other packages add to it: megatron-core allows numpy's own functions, which
    would then run instead of their stubs.
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

    Only tensors, containers and DeepSpeed's own few types are read, the latter as stubs. CheckpointError if the file is
    missing, damaged, or refers to any other global; ``trust`` unpickles without that limit, which runs whatever code
    the file's author put there.
    """
    _check_before_loading(path)
    with _named_failures(path), stubs_alone():
        return torch.serialization.load(path, map_location="cpu", mmap=True, weights_only=not trust)


def load_pt_of(path: Path, types: Allowed) -> Any:
    """Load a .pt file into memory, with objects of ``types`` in it as they are and of no others.

    For a library that needs its own objects back. Fails as ``load_pt`` does.
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
    """Inside, what torch.load raises becomes a CheckpointError that says what is wrong with the file."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path)) from error
    except Exception as error:  # a damaged pickle raises anything
        raise CheckpointError(damaged(path, error)) from error


def _check_own_name(path: Path) -> None:
    """torch.save names the archive's inner folder after the file: a shard under another rank's name betrays itself."""
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
    except Exception:  # whatever a damaged pickle raises while it is scanned: the refusal stands either way
        foreign = []
    named = ", ".join(foreign) or "an object that is not a tensor or a container"
    return (
        f"{path}: refers to {named}; loading it would run code from the checkpoint, so it was refused. If you trust who "
        "wrote this file, repeat with --trust."
    )
