"""Training: the step, the loop, sharding, checkpoints and run logs."""
