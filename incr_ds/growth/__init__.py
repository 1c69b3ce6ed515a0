"""Growth: a frozen plan from source, target sizes and recipe, and the arithmetic that the plan describes."""
