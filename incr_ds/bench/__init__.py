"""Measures time and memory of the loss, beside the lower bound and other implementations."""
