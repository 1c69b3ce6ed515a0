"""DeepSpeed's universal checkpoints: reading and writing them."""
