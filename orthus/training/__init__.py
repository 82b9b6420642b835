"""Training: settings -> the one fit loop -> optimisers, checkpoints and metrics."""
