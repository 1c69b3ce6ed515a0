"""Row kernels of the distillation loss in torch, Triton and CUDA, and the choice between them."""
