"""Models for training: transformers' layers with DeepSpeed's tensor parallelism and pipeline, and the teacher."""

import os

import torch


def choose_accelerator() -> None:
    """Name DeepSpeed's device before DeepSpeed is imported. Otherwise it guesses, with a warning if there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


choose_accelerator()
