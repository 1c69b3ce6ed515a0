"""Who holds which slice: placement over ranks, blocks, parameter groups, the modules of training codes."""
