"""What is wrong with an unroll, and which estimator to use: bias, variance and cost."""

from unrollgrad.diagnostics.bifurcations import Bifurcation, bifurcation
from unrollgrad.diagnostics.compare import Comparison, compare
from unrollgrad.diagnostics.costs import Cost, estimate_cost
from unrollgrad.diagnostics.diagnose import diagnose
from unrollgrad.diagnostics.diagnosis import Diagnosis
from unrollgrad.diagnostics.differences import GradientCheck, check_grad
from unrollgrad.diagnostics.horizons import HorizonSweep, horizon_sweep
from unrollgrad.diagnostics.lyapunov import (
    Lyapunov,
    episode_map,
    lyapunov,
    lyapunov_by_distance,
    lyapunov_of_map,
)
from unrollgrad.diagnostics.measurements import Derivatives, Measurements, StepCost
from unrollgrad.diagnostics.nonfinite import NonFinite, locate_nonfinite
from unrollgrad.diagnostics.recommend import RankedEstimator, recommend, what_would_change
from unrollgrad.diagnostics.sigmas import SigmaSweep, sigma_sweep
from unrollgrad.diagnostics.smoothness import (
    LossSlice,
    Metasmoothness,
    loss_slice,
    metasmoothness,
)
from unrollgrad.diagnostics.windows import Windows, exact_windows, measure_windows

__all__ = [
    "Bifurcation",
    "Comparison",
    "Cost",
    "Derivatives",
    "Diagnosis",
    "GradientCheck",
    "HorizonSweep",
    "LossSlice",
    "Lyapunov",
    "Measurements",
    "Metasmoothness",
    "NonFinite",
    "RankedEstimator",
    "SigmaSweep",
    "StepCost",
    "Windows",
    "bifurcation",
    "check_grad",
    "compare",
    "diagnose",
    "episode_map",
    "estimate_cost",
    "exact_windows",
    "horizon_sweep",
    "locate_nonfinite",
    "loss_slice",
    "lyapunov",
    "lyapunov_by_distance",
    "lyapunov_of_map",
    "measure_windows",
    "metasmoothness",
    "recommend",
    "sigma_sweep",
    "what_would_change",
]
