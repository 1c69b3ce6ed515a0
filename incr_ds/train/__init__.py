"""Continued pre-training under DeepSpeed."""
