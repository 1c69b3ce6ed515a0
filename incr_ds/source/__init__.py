"""Readers: any supported checkpoint, opened as a logical checkpoint of lazy tensors."""

from incr_ds.source.recognise import open_source

__all__ = ["open_source"]
