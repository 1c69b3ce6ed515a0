"""Targets: which rank holds which slice, and the writers of each on-disk layout."""
