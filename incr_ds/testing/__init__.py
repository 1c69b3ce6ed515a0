"""Pico models and the multi-process runner; imported by tests and tools only."""
