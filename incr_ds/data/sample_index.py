"""megatron-core's shuffled index of samples, kept on disk with checksums and rebuilt if it is damaged."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from incr_ds.checkpoint.publish import publish, verify_manifest
from incr_ds.errors import CheckpointError

KIND = "index of samples"


@dataclass(frozen=True)
class _Description:
    """What GPTDataset needs of a tokenizer when documents are not masked: only an identity.

    ``eod`` differs from the padding id, -1, which occurs in no data.
    """

    vocab_size: None = None
    eod: int = -2

    @property
    def unique_identifiers(self) -> dict[str, str]:
        return {"class": "tokens as they are"}


def ready_index(prefix: str, sequence_length: int, seed: int, folder: Path) -> None:
    """Ensure that ``folder`` holds the whole index of one pass over PREFIX.bin, with a manifest of checksums."""
    if folder.is_dir():
        if is_whole(folder):
            return
        shutil.rmtree(folder)
    with publish(folder, KIND, {"sequence_length": sequence_length, "seed": seed}) as work:
        open_samples(prefix, sequence_length, seed, work)


def is_whole(folder: Path) -> bool:
    """Whether the files match the manifest and are plain arrays. megatron-core would unpickle anything else."""
    try:
        verify_manifest(folder)
        return all(np.load(path, mmap_mode="r", allow_pickle=False).size for path in folder.glob("*.npy"))
    except (CheckpointError, OSError, ValueError):
        return False


def open_samples(prefix: str, sequence_length: int, seed: int, folder: Path) -> Any:
    """Open megatron-core's GPTDataset over PREFIX.bin and .idx. Its index is read from ``folder``, or written there."""
    # megatron-core takes seconds to import.
    from incr_ds.data.megatron import GPTDataset, GPTDatasetConfig, IndexedDataset, Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(folder),
        tokenizer=_Description(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(prefix, mmap=True)
    every = np.arange(len(indexed), dtype=np.int32)
    # A fixed name instead of the path: the stored index stays valid if the data moves.
    return GPTDataset(indexed, Path(prefix).name, every, None, Split.train, config)
