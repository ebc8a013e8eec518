"""What learned optimizers are trained and tested on; ``ug.learned_optimizers`` is what they are."""
