"""Token data on disk: what a data set is, whether it is whole, and a fingerprint of its content."""
