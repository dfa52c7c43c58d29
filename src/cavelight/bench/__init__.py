"""How fast a model runs here, next to what the machine could do."""
