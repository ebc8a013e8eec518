"""What is wrong with an unroll, and which estimator to use for it."""

from unrollgrad.diagnostics.compare import Comparison, compare
from unrollgrad.diagnostics.diagnose import diagnose
from unrollgrad.diagnostics.diagnosis import Diagnosis
from unrollgrad.diagnostics.lyapunov import (
    Lyapunov,
    episode_map,
    lyapunov,
    lyapunov_by_distance,
    lyapunov_of_map,
)
from unrollgrad.diagnostics.measurements import Cost, Derivatives, Measurements
from unrollgrad.diagnostics.recommend import RankedEstimator, recommend, what_would_change
from unrollgrad.diagnostics.windows import Windows, exact_windows, measure_windows

__all__ = [
    "Comparison",
    "Cost",
    "Derivatives",
    "Diagnosis",
    "Lyapunov",
    "Measurements",
    "RankedEstimator",
    "Windows",
    "compare",
    "diagnose",
    "episode_map",
    "exact_windows",
    "lyapunov",
    "lyapunov_by_distance",
    "lyapunov_of_map",
    "measure_windows",
    "recommend",
    "what_would_change",
]
