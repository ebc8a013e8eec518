"""Measuring estimators: bias, variance and cost side by side."""

from unrollgrad.diagnostics.compare import Comparison, compare

__all__ = ["Comparison", "compare"]
