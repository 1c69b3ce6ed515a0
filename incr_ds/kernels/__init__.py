"""Row kernels of the distillation loss: what they compute, in torch and in Triton, and which one is used."""
