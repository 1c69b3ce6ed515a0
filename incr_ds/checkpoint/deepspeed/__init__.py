"""DeepSpeed's native checkpoints, ZeRO-0 to 3, and what frameworks on top of it write."""
