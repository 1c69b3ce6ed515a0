"""The distillation loss, fused with the output projections."""
