"""Readers: any supported checkpoint, opened as a logical checkpoint of lazy tensors."""
