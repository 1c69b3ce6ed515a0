"""Typed settings: one file per stage, read by load_settings."""
