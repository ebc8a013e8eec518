"""Measuring estimators: bias, variance and cost side by side, and which one to use."""

from unrollgrad.diagnostics.compare import Comparison, compare
from unrollgrad.diagnostics.measurements import Cost, Derivatives, Measurements
from unrollgrad.diagnostics.recommend import RankedEstimator, recommend, what_would_change
from unrollgrad.diagnostics.windows import Windows, exact_windows, measure_windows

__all__ = [
    "Comparison",
    "Cost",
    "Derivatives",
    "Measurements",
    "RankedEstimator",
    "Windows",
    "compare",
    "exact_windows",
    "measure_windows",
    "recommend",
    "what_would_change",
]
