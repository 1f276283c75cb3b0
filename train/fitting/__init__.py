"""The fit of exit heads: losses, steps, checkpoints, log."""
