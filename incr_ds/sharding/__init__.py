"""Which rank holds which slice: placement over ranks, slices, parameter groups, the modules of other training codes."""
