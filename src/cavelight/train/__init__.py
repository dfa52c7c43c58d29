"""The recipe: losses, balance, optimisation, evaluation, and the loop that joins them."""
