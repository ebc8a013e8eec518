"""Inner training as a problem, and what inner optimizers do under differentiation."""
