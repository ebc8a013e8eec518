"""``stn_quadratic``: the best response that self-tuning networks learn, where it is known.

The inner loss is w^T H w / 2 + w^T (B theta - c + noise), the outer one |w - target|^2 / 2, so that
the best weights are w* = H^-1 (c - B theta) and their Jacobian is R* = -H^-1 B. H is diagonal,
which is only a choice of coordinates; so every weight learns by itself, from its row of B.

**With noise** of variance v in a weight's slope, let z be the errors of a weight and of its row of
the response, stacked. With h its curvature, e the perturbation, and the rates alpha (weights) and
rho (response), one training step is z <- A z + n with

    stn:        u = (1, theta + e),  A = I - h diag(alpha, rho..) u u^T,  n = -diag(..) u noise;
    delta_stn:  A = I - h [[alpha, 0], [rho e, rho e e^T]],               n = -(alpha, rho e) noise.

A and n are drawn afresh in each step, with n of mean zero given A: the mean of z tends to zero, and
its covariance to the C that solves C = E[A C A^T] + E[n n^T]. The entries are polynomials of e of
degree four at most, so that three Gauss-Hermite nodes for each hyperparameter give the expectations
exactly. For ``stn`` E[u u^T] is the badly conditioned matrix of a regression whose regressors are
not centred, and worse the further theta is from zero; for ``delta_stn`` theta does not appear.
"""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from unrollgrad.running import need

Method = Literal["delta_stn", "stn"]

METHODS: tuple[Method, ...] = ("delta_stn", "stn")


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Both self-tuning networks on quadratics whose best response is known in closed form.

    theta stays at a distance from zero (the radius), and both networks learn the response: without
    noise to the end, and with noise in many replicas, whose mean and spread are compared with the
    closed forms. Last, theta is tuned. In float64. The two rates of each network and radius are
    chosen among the same pairs, on a problem that is not reported.
    """

    weights: int = 8
    """Number of weights."""
    hyperparameters: int = 3
    """Number of hyperparameters."""
    radii: tuple[float, ...] = (0.0, 1.0, 3.0)
    """Distances of theta from zero."""
    num_steps: int = 6000
    """Training steps without noise."""
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Learning rates, to choose from, of the weights and of the response."""
    noise: float = 0.3
    """Standard deviation of the noise in each weight's slope."""
    noise_rate: float = 0.03
    """Both learning rates where there is noise; the closed form is for constant rates."""
    noise_steps: int = 8000
    """Training steps with noise."""
    replicas: int = 256
    """Runs with noise, over which the mean and the spread are taken."""
    tuning_steps: int = 3000
    """Steps of theta, five training steps each, where theta is tuned."""
    points: int = 60
    """Number of points on each curve; five times it divides the training steps."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws the quadratics."""
    tuning_seed: int = 100
    """The seed of the problem on which the rates are chosen."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        radii=(3.0,),
        num_steps=4000,
        rates=(0.1, 0.3),
        noise_steps=500,
        noise_rate=0.05,
        replicas=64,
        tuning_steps=300,
        points=20,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", weights=50, hyperparameters=10, replicas=4096),
}

STEPS = 5
"""Training steps of one call."""

CLOSE = 1e-4
"""How far the response may be from the exact one, relative to it, after it has converged."""


class Problem(NamedTuple):
    """The quadratics, and a direction of theta with length 1."""

    curvature: jax.Array
    mixed: jax.Array
    slope: jax.Array
    target: jax.Array
    direction: jax.Array

    @property
    def jacobian(self) -> jax.Array:
        """The exact R*."""
        return -self.mixed / self.curvature[:, None]

    def inner(self, w, theta, noise=0.0):
        """The training loss."""
        return w @ (self.curvature * w / 2 + self.mixed @ theta - self.slope + noise)

    def outer(self, w, theta):
        """The validation loss."""
        del theta
        return jnp.sum((w - self.target) ** 2) / 2

    def minimum(self, theta):
        """The best weights."""
        return (self.slope - self.mixed @ theta) / self.curvature


def problem(settings: Settings, seed: int) -> Problem:
    """Draws the quadratics of a seed; curvatures lie between 0.5 and 1."""
    keys = jax.random.split(jax.random.key(seed), 4)
    d, p = settings.weights, settings.hyperparameters
    mixed = jax.random.normal(keys[0], (d, p)) / np.sqrt(p)
    slope, target = jax.random.normal(keys[1], (2, d))
    direction = jax.random.normal(keys[2], (p,))
    curvature = jax.random.uniform(keys[3], (d,), minval=0.5, maxval=1.0)
    return Problem(curvature, mixed, slope, target, direction / jnp.linalg.norm(direction))


def network(method: Method, here: Problem, rates: Any, noise: float = 0.0) -> Any:
    """The estimator on these quadratics, with perturbations of standard deviation 1."""
    return getattr(ug.stn, method)(
        loss=lambda theta, w, batch, key: here.inner(w, theta, batch),
        meta_loss=lambda theta, w, key: here.outer(w, theta),
        init_params=lambda key: jnp.zeros_like(here.slope),
        sample_batch=lambda key: noise * jax.random.normal(key, here.slope.shape),
        inner_optimizer=optax.sgd(rates[0]),
        response_optimizer=optax.sgd(rates[1]),
        response=ug.stn.linear(),
        tune_sigma=False,
        train_steps=STEPS,
    )


class Errors(NamedTuple):
    """Relative errors of the response's Jacobian and of the hypergradient; and the Jacobian."""

    jacobian: jax.Array
    hypergradient: jax.Array
    found: jax.Array


def learned(
    settings: Settings, method: Method, here: Problem, radius: Any, rates: Any
) -> tuple[Errors, Any]:
    """The errors during training without noise, at points, and at the end."""
    theta = radius * here.direction
    estimator = network(method, here, rates)
    solve = ug.implicit.hypergradient(here.outer, here.inner, solver=ug.implicit.dense())
    exact = solve(here.minimum(theta), theta).grad
    key = jax.random.key(0)
    calls = settings.num_steps // STEPS // settings.points

    def call(state, _):
        out, state = estimator.estimate(key, theta, state)
        return state, out.grad

    def stretch(state, _):
        state, grads = jax.lax.scan(call, state, None, calls)
        found = state.carried.response
        away = jnp.linalg.norm(found - here.jacobian) / jnp.linalg.norm(here.jacobian)
        wrong = jnp.linalg.norm(grads[-1] - exact) / jnp.linalg.norm(exact)
        return state, Errors(away, wrong, found)

    _, errors = jax.lax.scan(stretch, estimator.init(key, theta), None, settings.points)
    return errors, jax.tree.map(lambda x: x[-1], errors)


@functools.cache
def _curve(settings: Settings, method: Method) -> Any:
    return jax.jit(functools.partial(learned, settings, method))


@functools.cache
def chosen(settings: Settings, method: Method, radius: float) -> tuple[float, float]:
    """The pair of rates with the lowest error of the Jacobian after a quarter of the steps."""
    pairs = [(a, b) for a in settings.rates for b in settings.rates]
    here = problem(settings, settings.tuning_seed)

    def score(rates):
        errors, _ = learned(settings, method, here, radius, rates)
        return errors.jacobian[settings.points // 4]

    scores = np.asarray(jax.jit(jax.vmap(score))(jnp.array(pairs)))
    return pairs[int(np.argmin(np.where(np.isfinite(scores), scores, np.inf)))]


@functools.cache
def _noisy(settings: Settings, method: Method) -> Any:
    """The Jacobians of all replicas after training with noise, at a radius of a problem."""
    rates = settings.noise_rate, settings.noise_rate

    @jax.jit
    def run(here, radius, keys):
        theta = radius * here.direction
        estimator = network(method, here, rates, settings.noise)

        def one(key):
            def call(state, _):
                return estimator.estimate(key, theta, state)[1], None

            steps = settings.noise_steps // STEPS
            return jax.lax.scan(call, estimator.init(key, theta), None, steps)[0].carried.response

        return jax.vmap(one)(keys)

    return run


def stationary(settings: Settings, method: Method, here: Problem, radius: float) -> float:
    """The mean squared error of the Jacobian that training with noise tends to; see above."""
    p = settings.hyperparameters
    nodes, shares = np.polynomial.hermite_e.hermegauss(3)
    perturbations = np.array(list(itertools.product(nodes, repeat=p)))
    weights = np.prod(list(itertools.product(shares / shares.sum(), repeat=p)), axis=1)
    theta, rate = radius * np.asarray(here.direction), settings.noise_rate
    ones = np.ones((len(weights), 1))
    if method == "stn":
        left = right = np.concatenate([ones, theta + perturbations], 1)
        moves = np.einsum("ki,kj->kij", left, right)
    else:
        left = np.concatenate([ones, perturbations], 1)
        moves = np.einsum("ki,kj->kij", left, left)
        moves[:, 0, 1:] = 0  # the weights see no perturbation
    total, size = 0.0, p + 1
    noises = np.einsum("k,ki,kj->ij", weights, left, left) * (rate * settings.noise) ** 2
    for h in np.asarray(here.curvature):
        steps = np.eye(size) - rate * h * moves
        twice = np.einsum("k,kij,klm->iljm", weights, steps, steps).reshape(size**2, size**2)
        if np.max(np.abs(np.linalg.eigvals(twice))) >= 1:
            return np.inf
        covariance = np.linalg.solve(np.eye(size**2) - twice, noises.ravel()).reshape(size, size)
        total += np.trace(covariance[1:, 1:])
    return total


def tuned(settings: Settings, method: Method, here: Problem, rates: Any) -> float:
    """How far theta ends from the outer minimum, relative to it, when it is tuned from zero."""
    jacobian = np.asarray(here.jacobian)
    away = np.asarray(here.target) - np.asarray(here.minimum(jnp.zeros(jacobian.shape[1])))
    best = np.linalg.lstsq(jacobian, away)[0]
    optimizer = optax.sgd(float(0.5 / np.linalg.norm(jacobian, 2) ** 2))
    estimator = network(method, here, rates)
    theta = jnp.zeros(jacobian.shape[1])
    result = ug.fit(
        estimator, theta, optimizer, num_steps=settings.tuning_steps, key=jax.random.key(2)
    )
    return float(np.linalg.norm(result.theta - best) / np.linalg.norm(best))


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the errors without noise, those with noise beside the closed form, and theta's."""
    with jax.enable_x64(True):
        setting = settings.without_run()
        here = problem(setting, seed)
        cells = list(itertools.product(METHODS, settings.radii))
        for i, (method, radius) in enumerate(cells):
            progress(f"{method}, |theta| = {radius:g}", i / len(cells))
            labels = {"method": method, "radius": f"{radius:g}"}
            rates = chosen(setting, method, radius)
            for row in _learning(setting, method, here, radius):
                write({**labels, **row})
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), settings.replicas)
            found = np.asarray(_noisy(setting, method)(here, radius, keys))
            theory = stationary(setting, method, here, radius)
            write({**labels, **_with_noise(found, np.asarray(here.jacobian), theory)})
            write({**labels, "rate": rates[0], "response_rate": rates[1]})
            if radius == settings.radii[-1]:
                write({**labels, "theta": tuned(setting, method, here, rates)})


def _learning(
    settings: Settings, method: Method, here: Problem, radius: float
) -> list[dict[str, float]]:
    rates = chosen(settings, method, radius)
    errors, _ = _curve(settings, method)(here, radius, rates)
    every = settings.num_steps // settings.points
    rows = [
        {"step": (i + 1) * every, "jacobian": float(a), "hypergradient": float(b)}
        for i, (a, b) in enumerate(zip(errors.jacobian, errors.hypergradient, strict=True))
    ]
    reached = np.flatnonzero(np.asarray(errors.jacobian) < CLOSE)
    first = float((reached[0] + 1) * every) if len(reached) else np.inf
    return [*rows, {"steps_needed": first}]


def _with_noise(found: np.ndarray, exact: np.ndarray, theory: float) -> dict[str, float]:
    """The mean squared error over the closed form, and the bias over what its noise explains."""
    error = np.sum((found - exact) ** 2, axis=(1, 2)).mean()
    explained = found.var(axis=0, ddof=1).sum() / len(found)
    wrong = np.sum((found.mean(0) - 0.9 * exact) ** 2)
    return {
        "spread": float(error / np.sum(exact**2)),
        "spread_by_theory": float(error / theory),
        "bias": float(np.sum((found.mean(0) - exact) ** 2) / explained),
        "bias_of_wrong": float(wrong / explained),
    }


COLORS = {"delta_stn": "C0", "stn": "C1"}
DASHES = ("-", "--", ":")


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the errors without noise; and the spread with noise against its closed form."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {"jacobian": "response's Jacobian", "hypergradient": "hypergradient"}
    for axis, (metric, title) in zip(axes, titles.items(), strict=False):
        for method in METHODS:
            for radius, dash in zip(config["radii"], DASHES, strict=False):
                line = _line(records, metric, method, f"{radius:g}")
                label = rf"{method}, $|\theta|$ = {radius:g}"
                axis.plot(*zip(*line, strict=True), dash, color=COLORS[method], label=label)
        axis.set(yscale="log", xlabel="training steps", ylabel="relative error", title=title)
        axis.grid(alpha=0.3)
    axes[0].axhline(CLOSE, color="k", linewidth=0.8)
    axes[1].axhline(0.01, color="k", linewidth=0.8)
    for method in METHODS:
        spread = [_mean(records, "spread", method, f"{r:g}") for r in config["radii"]]
        over = [_mean(records, "spread_by_theory", method, f"{r:g}") for r in config["radii"]]
        theory = [a / b for a, b in zip(spread, over, strict=True)]
        color = COLORS[method]
        axes[2].plot(config["radii"], theory, "-", color=color, label=f"{method}, closed form")
        axes[2].plot(config["radii"], spread, "o", color=color, label=f"{method}, measured")
    axes[2].set(yscale="log", xlabel=r"$|\theta|$", ylabel="mean squared error of the Jacobian")
    axes[2].set_title("with noise in the batches")
    axes[2].grid(alpha=0.3)
    axes[2].legend()
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=6)
    return figure


def _line(records: list[Record], metric: str, method: str, radius: str) -> list[tuple[int, float]]:
    """The geometric mean over seeds, by step."""
    found: dict[int, list[float]] = {}
    for r in records:
        if r.metric == metric and r.step is not None and r.labels == _labels(method, radius):
            found.setdefault(r.step, []).append(max(r.value, 1e-16))
    return [(step, float(np.exp(np.mean(np.log(x))))) for step, x in found.items()]


def _labels(method: str, radius: str) -> dict[str, str]:
    return {"method": method, "radius": radius}


def _mean(records: list[Record], metric: str, method: str, radius: str) -> float:
    where = _labels(method, radius)
    found = [r.value for r in records if r.metric == metric and r.labels == where]
    return float(np.mean(found))


def show(records: list[Record]) -> None:
    """Prints the last errors, the steps that were needed, and the spread with noise."""
    for method, radius in dict.fromkeys(tuple(r.labels.values()) for r in records):
        numbers = {
            metric: _mean(records, metric, method, radius)
            for metric in ("steps_needed", "spread", "spread_by_theory", "bias")
        }
        ends = [_line(records, m, method, radius)[-1][1] for m in ("jacobian", "hypergradient")]
        print(
            f"{method:>9}, |theta| = {radius}: Jacobian {ends[0]:.1e}, hypergradient {ends[1]:.1e}"
            f" (relative errors), {CLOSE:g} after {numbers['steps_needed']:.0f} steps; with noise "
            f"a squared error of {numbers['spread']:.2g}, {numbers['spread_by_theory']:.3f} times "
            f"the closed form, squared bias {numbers['bias']:.2f} times what its noise explains"
        )


def claims(summary: Summary) -> list[Claim]:
    """The response is the exact Jacobian, and the spread with noise is the closed form's."""
    radii = [f"{radius:g}" for radius in summary.about["config"]["radii"]]
    theory, out = "the theory (our closed form)", []
    for method in METHODS:
        for radius in radii:

            def of(metric, method=method, radius=radius):
                return summary.find(metric, method=method, radius=radius)

            at = f"{method}, |theta| = {radius}: "
            near = evidence.below(of("jacobian"), CLOSE)
            says = at + f"the response's Jacobian is the exact one, within {CLOSE:g} of it"
            out.append(Claim(says, "MacKay et al. 2019; Bae and Grosse 2020", *_ours(near)))
            near = evidence.below(of("hypergradient"), 0.01)
            says = at + "the gradient is implicit.hypergradient's, within 1 %"
            out.append(Claim(says, "the theory", *_ours(near)))
            agrees = evidence.within(of("spread_by_theory"), 0.95, 1.05)
            says = at + "with noise, the squared error is its closed form within 5 %"
            ours = f"{agrees.text} times the closed form"
            out.append(Claim(says, theory, ours, agrees.holds))
            unbiased = evidence.below(of("bias"), 2.0)
            says = at + "with noise, the squared bias is below twice what its noise explains"
            wrong = evidence.number(of("bias_of_wrong"))
            ours = f"{unbiased.text}; a response a tenth too small would have {wrong}"
            out.append(Claim(says, theory, ours, unbiased.holds))
        found = summary.find("theta", method=method, radius=radii[-1])
        near = evidence.below(found, 1e-3)
        says = f"{method}: theta ends at the outer minimum, within 0.1 % of its size"
        out.append(Claim(says, "the theory", *_ours(near)))
    first, second = (
        summary.find("steps_needed", method=method, radius=radii[-1]) for method in METHODS
    )
    fewer = evidence.less(first, second, 0.5)
    says = f"|theta| = {radii[-1]}: centred, the response needs less than half the steps"
    out.append(Claim(says, "Bae and Grosse 2020", *_ours(fewer)))
    return out


def _ours(found: evidence.Finding) -> tuple[str, bool | None]:
    return found.text, found.holds


EXPERIMENT = Experiment(
    name="stn_quadratic",
    about="Self-tuning networks on quadratics, where the best response is known.",
    settings=Settings,
    scales=SCALES,
    labels=("method", "radius"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "With 50 weights, 10 hyperparameters and 4096 replicas, the mean response differs from the "
        "exact Jacobian by more than four standard errors, or its spread from the closed form by "
        "more than 2 %."
    ),
)
