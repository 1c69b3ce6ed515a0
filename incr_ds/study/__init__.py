"""Compares growth with training from scratch."""
