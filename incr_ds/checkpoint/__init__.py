"""Checkpoints on disk: the logical checkpoint, integrity and publishing, and a package for each format."""
