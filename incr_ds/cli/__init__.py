"""Command lines: one module for each command, which tools/ and the console scripts run; errors, tables."""
