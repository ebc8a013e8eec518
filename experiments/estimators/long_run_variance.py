"""``long_run_variance``: the variance of the mean of one update, one episode, many episodes."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

import unrollgrad as ug
from experiments._framework.experiment import Experiment, Progress, Write
from experiments._framework.settings import CommonSettings
from experiments.estimators.long_run_variance_figure import RECURRENCES, UPDATES, claims, draw, show
from experiments.estimators.staggered_variance import staggered_variance
from experiments.problems import PROBLEMS
from unrollgrad.problems import theory


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """The variance of the mean of U consecutive updates at frozen theta: U = 1, n and 20 n.

    An episode has n windows, and an update is one window (with full ES a whole episode). All
    numbers have one unit: the trace of the variance of the mean, times the number of episode-pairs
    spent on it (one antithetic pair through one episode), over the squared norm of the gradient. A
    flat line means that the errors of consecutive updates are independent; a rising line, that they
    add up; a falling line, that they cancel, or that single updates differ from the gradient by
    their window's own part. nres is es_single with n workers at n different windows, and "pes
    staggered" is the same with pes (the steps that stagger the workers are not counted); the others
    are single workers. Closed forms are known on the recurrences.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. paper: more windows and samples; this is not a
    published figure."""
    problems: tuple[
        Literal["aligned", "independent", "conflicting", "text_lstm", "digits"], ...
    ] = ("aligned", "independent", "conflicting", "text_lstm", "digits")
    """aligned: a linear recurrence whose windows have the same gradient; independent: random
    gradients; conflicting: gradients that alternate in sign, so that their sum is small. text_lstm:
    all weights of an LSTM; digits: a learning-rate schedule."""
    estimators: tuple[
        Literal["full_es", "es_single", "nres", "gpes", "pes", "pes staggered"], ...
    ] = ("full_es", "es_single", "nres", "gpes", "pes", "pes staggered")
    """The estimators to run."""
    num_windows: int = 10
    """Windows per episode (n)."""
    truncation: int = 5
    """Inner steps per window."""
    num_noise_periods: int = 2
    """Draws of gpes's noise per episode, a divisor of the number of windows."""
    dim: int = 20
    """Dimension of the recurrences' theta."""
    memory: float = 0.0
    """The share of theta's influence on the recurrences that is left one step later."""
    num_samples: int = 200
    """Chains of 20 episodes on the recurrences."""
    num_samples_real: int = 20
    """Chains of 20 episodes on the other problems."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed draws other noise and other episodes, on the same problems at the same theta. Three
    do, since the claims rest on the samples of all seeds together."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        problems=("conflicting",),
        estimators=("full_es", "nres", "pes"),
        num_windows=4,
        truncation=1,
        dim=5,
        num_samples=200,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        num_windows=20,
        num_samples=2000,
        num_samples_real=300,
        seeds=(0, 1, 2, 3, 4),
    ),
}

REST = 0.2
"""The common part of conflicting gradients: their signs are 1 + REST and -1 + REST."""

SIGMA = {"text_lstm": 0.01, "digits": 0.03}
"""Small values, so that smoothing hardly matters; on the recurrences sigma changes nothing."""


class _Case(NamedTuple):
    """A problem, its estimators, and their closed forms."""

    problem: ug.UnrolledProblem
    theta: Any
    estimators: dict[str, ug.GradientEstimator]
    reference: Any
    exact: dict[str, dict[str, float]]  # by estimator and updates, not divided by |g|^2


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes three variances for each problem and estimator, as soon as they are measured."""
    names: tuple[str, ...] = settings.problems
    for i, name in enumerate(names):
        case = _prepare(settings.without_run(), name)
        samples = settings.num_samples if name in RECURRENCES else settings.num_samples_real

        def report(
            estimator: str, part: int, of: int, i: int = i, name: str = name, case: _Case = case
        ) -> None:
            order = [" reference", *case.estimators]
            done = (order.index(estimator) + part / of) / len(order)
            progress(f"{name}: {estimator.strip()}", (i + done) / len(names))

        def on_row(row: dict[str, Any], name: str = name, case: _Case = case) -> None:
            _write_row(settings, name, row, case.exact, write)

        ug.diagnostics.compare(
            case.problem,
            case.theta,
            case.estimators,
            reference=case.reference,
            num_samples=samples,
            num_chains=samples,
            batch_size=samples,
            key=jax.random.fold_in(jax.random.key(seed), i),
            progress=report,
            on_row=on_row,
        )


def _write_row(
    settings: Settings, problem: str, row: dict[str, Any], exact: dict[str, Any], write: Write
) -> None:
    """Writes the row's variances in the unit that ``Settings`` explains."""
    name, square = row["name"], row["reference_norm"] ** 2
    unit = _workers(settings, name) / square
    for updates, value in row["variance_of_mean"].items():
        label = UPDATES[
            [1, settings.num_windows, 20 * settings.num_windows].index(
                updates * settings.num_windows // row["num_windows"]
            )
        ]
        numbers = {
            "variance": value * unit,
            "variance_se": row["variance_of_mean_se"][updates] * unit,
        }
        if name in exact:
            numbers["exact"] = exact[name][label] / square
        write({"problem": problem, "estimator": name, "updates": label, **numbers})


def _workers(settings: Settings, name: str) -> int:
    return settings.num_windows if name in ("nres", "pes staggered") else 1


@functools.cache
def _prepare(settings: Settings, name: str) -> _Case:
    """The case, cached so that all seeds share its compiled programs."""
    horizon = settings.num_windows * settings.truncation
    if name in RECURRENCES:
        problem, theta, influence = recurrence(settings, name)
        exact = closed_forms(settings, influence)
        reference = jax.numpy.asarray(theory.gradient(influence), theta.dtype)
    else:
        problem, theta = _with_one_leaf(*PROBLEMS[name].make(horizon)[:2])
        exact, reference = {}, ug.bptt(problem)
    common = {
        "truncation": settings.truncation,
        "sigma": SIGMA.get(name, 1.0),
        "noise_period": horizon // settings.num_noise_periods,
        "num_pairs": 1,
    }
    one = {
        kind: ug.REGISTRY[kind].build(problem, **common)
        for kind in ("full_es", "es_single", "gpes", "pes")
    }
    staggered = {
        name: ug.average(one[kind], settings.num_windows, stagger="burn_in")
        for name, kind in {"nres": "es_single", "pes staggered": "pes"}.items()
    }
    found: dict[str, ug.GradientEstimator] = {**one, **staggered}
    asked: dict[str, None] = dict.fromkeys(settings.estimators)
    return _Case(problem, theta, {name: found[name] for name in asked}, reference, exact)


def _with_one_leaf(problem: ug.UnrolledProblem, theta: Any) -> tuple[ug.UnrolledProblem, jax.Array]:
    """Theta as one vector, because one leaf's noise compiles many times faster than fourteen's."""
    vector, unravel = ravel_pytree(theta)

    def init(key, theta):
        return problem.init(key, unravel(theta))

    def step(key, theta, state, t):
        return problem.step(key, unravel(theta), state, t)

    return problem._replace(init=init, step=step), vector


def recurrence(settings: Settings, name: str) -> tuple[ug.UnrolledProblem, jax.Array, np.ndarray]:
    """A linear recurrence, its theta, and its influence of shape (T, T, P)."""
    horizon = settings.num_windows * settings.truncation
    gradients = "independent" if name == "independent" else "identical"
    problem, theta, influence = ug.problems.linear_recurrence(
        settings.dim, horizon, gradients=gradients, memory=settings.memory
    )
    if name != "conflicting":
        return problem, theta, influence(theta)
    windows = np.arange(horizon) // settings.truncation
    signs = np.where(windows % 2 == 0, 1.0, -1.0) + REST

    def step(key, theta, state, t):
        state, loss = problem.step(key, theta, state, t)
        return state, jax.numpy.asarray(signs, jax.numpy.result_type(loss))[t] * loss

    return problem._replace(step=step), theta, signs[:, None, None] * influence(theta)


def closed_forms(settings: Settings, influence: np.ndarray) -> dict[str, dict[str, float]]:
    """The closed forms by estimator and updates, for one episode-pair."""
    n, truncation = settings.num_windows, settings.truncation
    periods = {
        "es_single": None,
        "gpes": len(influence) // settings.num_noise_periods,
        "pes": truncation,
    }
    out = {}
    for name, period in periods.items():
        episode = theory.episode_variance(influence, truncation, period)
        single = theory.window_variance(influence, truncation, period) / n
        out[name] = {"1": single, "n": episode, "20n": episode}
    for name, kind in {"nres": "es_single", "pes staggered": "pes"}.items():
        out[name] = {
            label: staggered_variance(influence, truncation, periods[kind], updates)
            for label, updates in zip(UPDATES, (1, n, 20 * n), strict=True)
        }
    return {**out, "full_es": {k: v for k, v in out["es_single"].items() if k != "1"}}


EXPERIMENT = Experiment(
    name="long_run_variance",
    about="The variance of one update against that of many: PES, GPES, ES-Single, NRES, full ES.",
    settings=Settings,
    scales=SCALES,
    labels=("problem", "estimator", "updates"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "With 100,000 outer parameters, the long-run variance of ES-Single or NRES is over 10 "
        "% off that of full ES, with a standard error of 2 % or less."
    ),
)
