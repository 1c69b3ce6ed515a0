"""Offline growth: plans it, runs it over threads and processes, and compares two models."""
