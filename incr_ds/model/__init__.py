"""Models for training: transformers' layers, DeepSpeed's tensor parallelism and pipeline, the teacher."""

import os

import torch


def choose_accelerator() -> None:
    """Name DeepSpeed's device before it is imported; otherwise it guesses, and warns where there is no GPU."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


choose_accelerator()
