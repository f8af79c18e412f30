"""What the training loop stands on: checkpoints, EMA, optimiser."""
