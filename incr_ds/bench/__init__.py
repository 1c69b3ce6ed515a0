"""How long the loss takes and how much memory it needs, beside the floor and what else there is."""
