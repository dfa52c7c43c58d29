"""What is wrong with a checkpoint: configuration, headers, weights, tokens, and the model as it runs."""
