"""unrollgrad: gradients through unrolled computation.

    theta -> GradientEstimator -> Estimate(grad, loss, info) -> any optax optimizer -> theta

what is unrolled      UnrolledProblem(init, step, horizon): any inner loop, as pure functions
                      training_problem(...), TrainingState: training; final_loss: of its end
                      problems: small problems with known answers; constraints: for hyperparameters
one worker            bptt(problem), tbptt(problem, truncation=10): backpropagation, whole or cut
                      replay: bptt in many dispatches; mixed_value_and_grad: it in less memory
                      full_es, truncated_es: evolution strategies, whole or cut; noise: their laws
                      pes, es_single, gpes: persistent evolution strategies, cut and still right
                      pes_analytic, pes_analytic_replacement, reparameterized_es: with gradients
                      forward_mode, uoro, dodge: forward through time
                      REGISTRY: a table of all of them, with bias, variance, time and memory
many workers          average(estimator, 64); make_worker_mesh: many devices; curriculum: stages;
                      scheduled: a setting, such as sigma, that changes over a run
the outer loop        fit(estimator, theta, optax.adam(0.01), num_steps=..., key=...) -> FitResult
which one is best     diagnostics.diagnose(problem, theta, ...): a verdict; diagnostics.compare
                      episode_loss(problem, key, theta): the objective of one episode
without unrolling     implicit: derivatives of optima and fixed points; bilevel: algorithms on them
for some models       samplers: rewards of diffusion and flow models; stn: self-tuning networks
optimizers            apo: adapt during a run; learned_optimizers: load("scheduled_adam"), or train
the contracts         GradientEstimator, Estimate, Episode, Info, AverageInfo: see types

Start with ``help(unrollgrad.pes)`` or the README; every function's help has an example.
"""

import importlib
from types import ModuleType

from unrollgrad import (
    apo,
    constraints,
    diagnostics,
    learned_optimizers,
    noise,
    problems,
    samplers,
    stn,
)
from unrollgrad._core.unroll import episode_loss
from unrollgrad._fit.fit import fit
from unrollgrad._fit.result import FitResult
from unrollgrad._replay.replay import replay
from unrollgrad._training.mixed_gradient import mixed_value_and_grad
from unrollgrad._training.training_problem import TrainingState, final_loss, training_problem
from unrollgrad._workers.average import average
from unrollgrad._workers.curriculum import curriculum
from unrollgrad._workers.mesh import make_worker_mesh
from unrollgrad._workers.scheduled import scheduled
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
    "mixed_value_and_grad",
    "noise",
    "pes",
    "pes_analytic",
    "pes_analytic_replacement",
    "problems",
    "reparameterized_es",
    "replay",
    "samplers",
    "scheduled",
    "stn",
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
    return [*__all__, "__version__"]
