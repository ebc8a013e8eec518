"""What is wrong with an unroll, and estimators side by side: bias, variance and cost."""

from unrollgrad.diagnostics.compare import Comparison, compare
from unrollgrad.diagnostics.costs import Cost, estimate_cost
from unrollgrad.diagnostics.differences import GradientCheck, check_grad
from unrollgrad.diagnostics.horizons import HorizonSweep, horizon_sweep
from unrollgrad.diagnostics.lyapunov import (
    Lyapunov,
    episode_map,
    lyapunov,
    lyapunov_by_distance,
    lyapunov_of_map,
)
from unrollgrad.diagnostics.nonfinite import NonFinite, locate_nonfinite
from unrollgrad.diagnostics.sigmas import SigmaSweep, sigma_sweep
from unrollgrad.diagnostics.smoothness import (
    LossSlice,
    Metasmoothness,
    loss_slice,
    metasmoothness,
)

__all__ = [
    "Comparison",
    "Cost",
    "GradientCheck",
    "HorizonSweep",
    "LossSlice",
    "Lyapunov",
    "Metasmoothness",
    "NonFinite",
    "SigmaSweep",
    "check_grad",
    "compare",
    "episode_map",
    "estimate_cost",
    "horizon_sweep",
    "locate_nonfinite",
    "loss_slice",
    "lyapunov",
    "lyapunov_by_distance",
    "lyapunov_of_map",
    "metasmoothness",
    "sigma_sweep",
]
