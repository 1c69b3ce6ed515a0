"""What tensors a model has: named axes, and one declaration per tensor."""
