"""unrollgrad: gradients through unrolled computation.

    theta -> GradientEstimator -> Estimate(grad, loss, info) -> any optax optimizer -> theta

An inner loop is an ``UnrolledProblem`` (or ``training_problem(...)``); an estimator such as
``pes(problem, truncation=10, sigma=0.1)`` describes one worker; ``average(estimator, 64)`` is the
mean of many. See the README for a table of the estimators.
"""

from unrollgrad import constraints, diagnostics, noise, problems
from unrollgrad.curriculum import curriculum
from unrollgrad.estimators import (
    REGISTRY,
    bptt,
    es_single,
    full_es,
    gpes,
    pes,
    tbptt,
    truncated_es,
)
from unrollgrad.fit import FitResult, fit
from unrollgrad.mesh import make_worker_mesh
from unrollgrad.training import TrainingState, final_loss, training_problem
from unrollgrad.types import (
    AverageInfo,
    Episode,
    Estimate,
    GradientEstimator,
    Info,
    UnrolledProblem,
)
from unrollgrad.unroll import episode_loss
from unrollgrad.workers import average

__version__ = "0.1.0"

__all__ = [
    "REGISTRY",
    "AverageInfo",
    "Episode",
    "Estimate",
    "FitResult",
    "GradientEstimator",
    "Info",
    "TrainingState",
    "UnrolledProblem",
    "average",
    "bptt",
    "constraints",
    "curriculum",
    "diagnostics",
    "episode_loss",
    "es_single",
    "final_loss",
    "fit",
    "full_es",
    "gpes",
    "make_worker_mesh",
    "noise",
    "pes",
    "problems",
    "tbptt",
    "training_problem",
    "truncated_es",
]
