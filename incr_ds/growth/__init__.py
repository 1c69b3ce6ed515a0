"""Growth: from (source shape, target shape, recipe) to a frozen plan, and the arithmetic that a plan asks for."""
