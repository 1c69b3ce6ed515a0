"""Token data on disk: text to tokens, checks of data sets, fingerprints, and samples in a fixed order."""
