"""Linear problems in closed form: exact errors of all estimators, and simulated measurements."""

from typing import NamedTuple

import numpy as np

from unrollgrad.diagnostics import Derivatives, Measurements, StepCost, Windows, exact_windows
from unrollgrad.diagnostics.measurements import derivatives_of
from unrollgrad.problems import theory

DIRECTIONS = 16


class Problem(NamedTuple):
    """s_{t+1} = A s_t + theta with diagonal A, losses c_t . s_{t+1}, a window a step.

    Attributes:
        influence: (n, n, P) as in ``ug.problems.theory``.
        data: The variance of a factor with mean 1 by which episodes scale the influence.
        differentiable: Whether estimators may use derivatives.
        num_workers: The workers that set the budget.
        backward: Seconds of a step forwards and back; a step forwards takes one second.
    """

    influence: np.ndarray
    data: float
    differentiable: bool
    num_workers: int
    backward: float

    def cost(self) -> StepCost:
        backward = self.backward if self.differentiable else float("nan")
        return StepCost(1.0, backward, 1.5)

    def sizes(self) -> tuple[int, int]:
        return len(self.influence), self.influence.shape[-1]


def problem(draws: np.random.Generator, number: int, dim: int, agreement: str) -> Problem:
    """A random problem; the windows' gradients agree, are independent or cancel."""
    radius = draws.uniform(0.5, 1.1)
    decay = radius * draws.uniform(0.5, 1.0, size=dim) * draws.choice([0.1, 1.0])
    shared = draws.normal(size=dim)
    own = draws.normal(size=(number, dim))
    share = {"agree": 1.0, "mixed": draws.uniform(0.2, 0.9), "independent": 0.0, "cancel": 0.5}
    slopes = share[agreement] * shared + (1 - share[agreement]) * own
    if agreement == "cancel":
        slopes = shared * np.where(np.arange(number) % 2, -0.9, 1.0)[:, None] + 0.1 * own
    lag = np.arange(number)[:, None] - np.arange(number)
    influence = np.where(lag[..., None] >= 0, decay ** np.maximum(lag, 0)[..., None], 0.0)
    influence = influence * slopes[:, None]
    data = draws.choice([0.0, 0.1, 1.0, 10.0, 100.0])
    differentiable = bool(draws.integers(2))
    return Problem(
        influence, data, differentiable, int(draws.choice([4, 32, 256])), draws.uniform(2, 5)
    )


def family(seed: int, repeats: int = 5) -> list[Problem]:
    """P in 1, 5, 50, 500, n in 1, 4, 32, and how far the windows agree: 48 kinds of problems."""
    draws = np.random.default_rng(seed)
    return [
        problem(draws, number, dim, agreement)
        for number in (1, 4, 32)
        for dim in (1, 5, 50, 500)
        for agreement in ("agree", "mixed", "independent", "cancel")
        for _ in range(repeats)
    ]


def truth(p: Problem) -> dict[tuple[str, str], float]:
    """The mean squared error over |g|^2 of every estimator at the budget, by name and settings."""
    number, dim = p.sizes()
    g, own = theory.gradient(p.influence), theory.truncated_gradient(p.influence, 1)
    norm, forgotten = g @ g, own @ own
    budget = p.num_workers * 2
    more = 1 + p.data

    def key(name: str, **settings: int) -> tuple[str, str]:
        return name, str(settings)

    def pair(period):
        return more * theory.episode_variance(p.influence, 1, period) + p.data * norm

    errors = {key("es_single"): pair(None) * 2, key("full_es"): pair(None) * 2}
    for period in range(1, number) if number < 9 else (1, 2, 3, 4, 6, 8, 12, 16, 22):
        settings = {"noise_period": period} if period > 1 else {}
        errors[key("gpes" if settings else "pes", **settings)] = pair(period) * 2
    found = {k: v / budget for k, v in errors.items()}
    bias = np.sum((own - g) ** 2)
    short = more * theory.truncated_variance(p.influence, 1) + p.data * forgotten
    found[key("truncated_es")] = bias + 3 * short / budget
    if p.differentiable:
        back, tangent = p.backward, 1.5
        found[key("bptt")] = p.data * norm * back / budget
        found[key("tbptt")] = bias + p.data * forgotten * back / budget
        found[key("forward_mode")] = p.data * norm * (1 + dim * tangent) / budget
        dodge = (dim - 1) * more * norm + p.data * norm
        found[key("dodge")] = dodge * (1 + tangent) / budget
        for name, later in (("pes_analytic", False), ("pes_analytic_replacement", True)):
            analytic = more * analytic_variance(p.influence, later) + p.data * norm
            found[key(name)] = analytic * (2 + back) / budget
    return {k: float(v / norm) for k, v in found.items()}


def analytic_variance(influence: np.ndarray, later: bool) -> float:
    """The variance of ``pes_analytic``, or of the replacement form, by its definition.

    Noise u_i weighs the losses of windows i and later (later than i), in each of which every
    earlier u_j (and not the window's own) moves the loss.
    """
    number, _, dim = influence.shape
    k, i, j = np.ogrid[:number, :number, :number]
    weighed = (k > j) & ((k > i) if later else (k >= i))
    c = np.einsum("kij,kjp->ijp", weighed / number, influence)
    return float(dim * np.sum(c**2) + np.einsum("ijp,jip->", c, c))


def exact(p: Problem) -> Measurements:
    """Exact measurements; episodes do not differ."""
    number, _ = p.sizes()
    g, own = theory.gradient(p.influence), theory.truncated_gradient(p.influence, 1)
    derivatives = None
    if p.differentiable:
        forgotten, norm = np.array([own @ own]), np.array([g @ g])
        bias = np.array([np.sum((own - g) ** 2)])
        derivatives = Derivatives(0 * norm, norm, norm, bias, bias, 0 * norm, forgotten, forgotten)
    windows = exact_windows(p.influence, 1)
    return Measurements(number, 1, p.num_workers, windows, derivatives, p.cost(), "a while_loop")


def simulated(p: Problem, seed: int) -> Measurements:
    """What ``diagnose`` would measure: random directions with two episodes each."""
    number, dim = p.sizes()
    draws = np.random.default_rng(seed)
    factors = 1 + np.sqrt(p.data) * draws.normal(size=(DIRECTIONS, 2))
    signs = draws.choice([-1.0, 1.0], size=(DIRECTIONS, dim))
    along = np.tensordot(signs, p.influence, axes=(1, 2)) / number
    influence = factors[:, :, None, None] * along[:, None]
    own = np.einsum("dekk->dek", influence)
    windows = Windows(influence, own, None, 1, dim)
    derivatives = None
    if p.differentiable:
        of = [theory.gradient(p.influence), theory.truncated_gradient(p.influence, 1)]
        whole, truncated = (factors[..., None] * g for g in of)
        along = np.stack([windows.slope(), own.sum(axis=2)])
        derivatives = derivatives_of(whole, truncated, along, windows)
    return Measurements(number, 1, p.num_workers, windows, derivatives, p.cost(), "a while_loop")
