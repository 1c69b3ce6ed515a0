"""Growth against training from scratch."""
