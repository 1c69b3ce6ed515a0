"""incr_ds: grow a trained language model into a larger one and continue pre-training it under DeepSpeed."""
