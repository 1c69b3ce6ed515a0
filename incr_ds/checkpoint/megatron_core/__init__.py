"""Megatron-core's checkpoints in the format torch_dist."""
