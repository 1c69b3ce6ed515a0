"""Command lines: errors, tables, and what the thin scripts in tools/ call."""
