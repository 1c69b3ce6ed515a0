"""Models for training: transformers' layers, DeepSpeed's tensor parallelism and pipeline, the teacher."""
