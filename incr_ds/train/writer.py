"""Writes the files of DeepSpeed's checkpoints, at once or from memory while training goes on.

DeepSpeed's ranks meet in collective operations until the end of a save. A rank that cannot write must take part in them
to the end, so its error is kept until then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from incr_ds.checkpoint.publish import flushed_digest

Digest = dict[str, Any]


class CheckpointWriter(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's checkpoint engine for saving.

    In the ``background``, ``save`` only copies the tensors to memory. A thread writes the file, flushes it to disk and
    hashes it. The next save fills the same memory again, since fresh memory has to be touched first. So it must come after
    ``finish`` or ``abandon``.
    """

    def __init__(self, zipfile_serialization: bool, *, background: bool) -> None:
        self.name = type(self).__name__
        self.zipfile_serialization = zipfile_serialization
        self._pool = ThreadPoolExecutor(1, "checkpoint writer") if background else None
        self._stager = _stager() if background else None
        self._files: dict[Path, Future[Digest]] = {}
        self._error: Exception | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, or begin to."""
        if self._pool is None or self._stager is None:
            self.attempt(lambda: self._write(state_dict, path))
        else:
            self._files[Path(path)] = self._pool.submit(self._write_whole, self._stager.stage(state_dict), path)

    def _write(self, state_dict: Any, path: str) -> None:
        try:
            super().save(state_dict, path)
        except RuntimeError as error:
            # torch's message has no path, and of a full disk it says "unexpected pos".
            raise RuntimeError(f"{path}: {_disk_error(Path(path)) or str(error).splitlines()[0]}") from error

    def _write_whole(self, state_dict: Any, path: str) -> Digest:
        self._write(state_dict, path)
        return flushed_digest(Path(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""
        self.attempt(lambda: os.makedirs(path, exist_ok=exist_ok))

    def attempt(self, work: Callable[[], Any]) -> None:
        """Do ``work``, and keep its error for ``check``. A full disk is a RuntimeError of torch.save."""
        try:
            work()
        except (OSError, RuntimeError) as error:
            self._error = self._error or error

    def check(self) -> None:
        """Raise the first error since the last call."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def is_writing(self) -> bool:
        """Whether the background thread has something left to write."""
        return not all(file.done() for file in self._files.values())

    def finish(self) -> dict[Path, Digest]:
        """Wait for the background thread. Returns the size and xxh3 of its files. Raises the first error."""
        files, self._files = self._files, {}
        for file in files.values():
            self.attempt(file.result)
        self.check()
        return {path: file.result() for path, file in files.items()}

    def abandon(self) -> None:
        """Wait for what a save that failed has left to write. Nobody asks for its files or errors any more."""
        wait(self._files.values())
        self._files.clear()

    def release(self) -> None:
        """Free the memory. Nothing can be saved in the background afterwards."""
        if self._stager is not None:
            self._stager.close()


def install_writer(engine: DeepSpeedEngine, *, background: bool) -> CheckpointWriter:
    """Let ``engine`` save through a CheckpointWriter."""
    writer = CheckpointWriter(engine.checkpoint_engine.zipfile_serialization, background=background)
    engine.checkpoint_engine = writer
    copy = engine._copy_recovery_script  # rank 0 copies zero_to_fp32.py, without its checkpoint engine
    engine._copy_recovery_script = lambda path: writer.attempt(lambda: copy(path))
    return writer


def _disk_error(path: Path) -> str | None:
    """What the disk says to a file that could not be written; None if it can be written now."""
    try:
        with open(path, "ab") as stream:
            stream.write(bytes(1 << 20))
    except OSError as error:
        return error.strerror
    return None


def _stager() -> DefaultStager:
    """Copies a state dict to memory, which is pinned where there is a GPU, and keeps what its tensors share."""
    on_gpu = torch.cuda.is_available()
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
        )
    )
