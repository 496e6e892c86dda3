"""What transformers does not say about some model families."""
