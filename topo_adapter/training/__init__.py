"""Training, on `transformers.Trainer`."""
