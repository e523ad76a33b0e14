"""What runs: the step, optimizers, checkpoints, generation, what happens when memory runs out."""
