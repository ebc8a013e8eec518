"""Hypergradients through an optimum: quality, cleaning, distillation, warm starts."""
