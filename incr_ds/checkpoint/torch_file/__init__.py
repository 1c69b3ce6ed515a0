"""PyTorch's .pt files: validated, loaded without running code, checked and written."""
