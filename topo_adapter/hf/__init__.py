"""What transformers hands an attention module: geometry, arguments, cache."""
