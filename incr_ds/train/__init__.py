"""Continued pre-training under DeepSpeed."""

from incr_ds.model import choose_accelerator

choose_accelerator()
