"""Other programs that run the same weights, in turn with ours."""
