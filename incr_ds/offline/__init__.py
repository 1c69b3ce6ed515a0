"""The offline story: plan a growth, run it, compare, over threads and processes."""
