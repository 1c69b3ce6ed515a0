"""Token data on disk for tests, written by megatron-core."""

import numpy as np

from incr_ds.data.megatron import IndexedDatasetBuilder
from incr_ds.testing.memory import SMALL


def write_documents(prefix, documents, dtype=np.uint16):
    """Write a data set whose documents are lists of token ids, one sequence each. Returns the prefix as text."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_random_documents(folder, documents, length, number=lambda token: token):
    """Write x_train and x_validation below ``folder``, of tokens drawn over the vocabulary of SMALL.

    ``number`` gives the id of each drawn token, as a tokenizer does.
    """
    generator = np.random.default_rng(0)
    for name in ("train", "validation"):
        drawn = [generator.integers(0, SMALL["vocab"], length) for _ in range(documents)]
        drawn = [number(tokens).tolist() for tokens in drawn]
        write_documents(folder / f"x_{name}_text_document", drawn)
