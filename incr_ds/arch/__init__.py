"""What tensors a model has: named axes, one declaration per tensor, and the logical view of a checkpoint."""
