"""Imports the part of megatron-core that is used here, without its warnings about GPU libraries.

The import takes seconds, so callers import this module only where they need it.
"""

from __future__ import annotations

import warnings

from incr_ds.data.importing import without_compiler

with warnings.catch_warnings(action="ignore"), without_compiler():
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.helpers_cpp import build_blending_indices
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

__all__ = [
    "DType",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Split",
    "build_blending_indices",
]
