"""Typed settings: the recipe, the run file and the files that others wrote."""
