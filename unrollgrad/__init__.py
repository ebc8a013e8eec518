"""unrollgrad: gradients through unrolled computation.

    theta -> GradientEstimator -> Estimate(grad, loss, info) -> any optax optimizer -> theta

An inner loop is an ``UnrolledProblem`` (or ``training_problem(...)``); an estimator such as
``pes(problem, truncation=10, sigma=0.1)`` describes one worker, ``average(estimator, 64)`` the mean
of many. docs/estimators.md has a table of the estimators.
"""

import importlib
from types import ModuleType

from unrollgrad import apo, constraints, diagnostics, learned_optimizers, noise, problems
from unrollgrad._core.unroll import episode_loss
from unrollgrad._fit.fit import FitResult, fit
from unrollgrad._training.training_problem import TrainingState, final_loss, training_problem
from unrollgrad._workers.average import average
from unrollgrad._workers.curriculum import curriculum
from unrollgrad._workers.mesh import make_worker_mesh
from unrollgrad.estimators import (
    REGISTRY,
    bptt,
    dodge,
    es_single,
    forward_mode,
    full_es,
    gpes,
    pes,
    pes_analytic,
    pes_analytic_replacement,
    reparameterized_es,
    tbptt,
    truncated_es,
    uoro,
)
from unrollgrad.types import (
    AverageInfo,
    Episode,
    Estimate,
    GradientEstimator,
    Info,
    UnrolledProblem,
)

__version__ = "0.2.0"

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
    "apo",
    "average",
    "bilevel",
    "bptt",
    "constraints",
    "curriculum",
    "diagnostics",
    "dodge",
    "episode_loss",
    "es_single",
    "final_loss",
    "fit",
    "forward_mode",
    "full_es",
    "gpes",
    "implicit",
    "learned_optimizers",
    "make_worker_mesh",
    "noise",
    "pes",
    "pes_analytic",
    "pes_analytic_replacement",
    "problems",
    "reparameterized_es",
    "tbptt",
    "training_problem",
    "truncated_es",
    "uoro",
]


def __getattr__(name: str) -> ModuleType:
    """Imports ``implicit`` or ``bilevel``, and lineax with it, when it is first used."""
    if name in ("bilevel", "implicit"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names; ``implicit`` and ``bilevel`` are listed before they are imported."""
    return __all__
