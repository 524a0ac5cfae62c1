"""State, step, loop, sharding and checkpoints of a training run."""
