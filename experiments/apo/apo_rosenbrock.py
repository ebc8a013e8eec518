"""``apo_rosenbrock``: the paths of optimizers over two parameters in a curved valley."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from unrollgrad import apo
from unrollgrad.running import need

GRADIENT_DESCENT, ADAM = "gradient descent at its best rate", "Adam at its best rate"
APO_RATE, APO_DENSE, NEWTON = "APO learning rate", "APO preconditioner", "Newton, proximal"
TINY = 1e-30
"""Lower values of the function are rounding errors, and count as this in logarithms."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Five methods minimise (1 - x)² + 100 (y - x²)² from one point, without noise.

    They are gradient descent and Adam at the best of nine rates, APO's learning rate for gradient
    descent, APO's dense preconditioner, and Newton's method on the preconditioner's objective. The
    discrepancy compares the residuals √2 (1 - x, 10 (y - x²)); lambda_wsd is 0.
    """

    start: tuple[float, float] = (-1.0, 1.5)
    """Initial point of all methods; each seed adds a normal perturbation of scale 0.05."""
    initial_learning_rates: tuple[float, float] = (1e-3, 1e-3)
    """Initial learning rate, and initial preconditioner (this number times the identity)."""
    lambda_fsd: tuple[float, float] = (1.0, 10.0)
    """Weight of the residuals' squared error in a step: for the rate, for the preconditioner."""
    meta_learning_rates: tuple[float, float] = (0.03, 0.03)
    """Rates of the meta-optimizer RMSprop: for the learning rate, for the preconditioner."""
    num_steps: int = 2000
    """Number of steps of every method; APO takes a meta-step in each of them."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws its perturbation of ``start``."""


SCALES = {
    "smoke": Settings(scale="smoke", num_steps=100, seeds=(0,)),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=10_000),
}


def residuals(point: jax.Array, _: object = None) -> jax.Array:
    """The residuals; Rosenbrock's function is half their squared norm."""
    x, y = point
    return jnp.sqrt(2.0) * jnp.stack([1 - x, 10 * (y - x**2)])


def rosenbrock(point: jax.Array, _: object = None) -> jax.Array:
    """Rosenbrock's function; its minimum is 0 at (1, 1)."""
    return jnp.sum(residuals(point) ** 2) / 2


def path(optimizer: optax.GradientTransformation, start: jax.Array, num_steps: int) -> jax.Array:
    """All points of the path, including ``start``."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(carry, _):
        point, state = carry
        updates, state = optimizer.update(
            jax.grad(rosenbrock)(point),
            state,
            point,
            loss=rosenbrock,
            predict=residuals,
            batch=0.0,
            other_batch=0.0,
        )
        point = optax.apply_updates(point, updates)
        return (point, state), point

    _, points = jax.lax.scan(step, (start, optimizer.init(start)), length=num_steps)
    return jnp.concatenate([start[None], points])


def newton(lambda_fsd: float) -> optax.GradientTransformation:
    """Steps along -(H + lambda_fsd G)^-1 g, the optimum of the dense preconditioner; G = J'J."""

    def update(updates, params):
        jacobian = jax.jacobian(residuals)(params)
        matrix = jax.hessian(rosenbrock)(params) + lambda_fsd * jacobian.T @ jacobian
        return -jnp.linalg.solve(matrix, updates)

    return optax.stateless(update)


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes every path and the values of the function on it."""
    noise = jax.random.normal(jax.random.key(seed), (2,))
    start = jnp.asarray(settings.start) + 0.05 * noise
    rate, dense = (
        make(
            first,
            lambda_fsd=weight,
            lambda_wsd=0.0,
            discrepancy=apo.squared_error,
            meta_optimizer=optax.rmsprop(meta_rate, eps=1e-30),
            meta_interval=1,
        )
        for make, first, weight, meta_rate in zip(
            (
                functools.partial(apo.learning_rate, optax.sgd),
                functools.partial(apo.preconditioner, structure=apo.dense()),
            ),
            settings.initial_learning_rates,
            settings.lambda_fsd,
            settings.meta_learning_rates,
            strict=True,
        )
    )
    with jax.enable_x64(True):
        start = start.astype(jnp.float64)
        paths = {
            GRADIENT_DESCENT: _best(optax.sgd, np.geomspace(1e-4, 1e-2, 9), start, settings),
            ADAM: _best(optax.adam, np.geomspace(1e-3, 1, 9), start, settings),
            APO_RATE: path(rate, start, settings.num_steps),
            APO_DENSE: path(dense, start, settings.num_steps),
            NEWTON: path(newton(settings.lambda_fsd[1]), start, settings.num_steps),
        }
        for i, (method, points) in enumerate(paths.items()):
            progress(method, i / len(paths))
            values = jax.vmap(rosenbrock)(points)
            for j, ((x, y), value) in enumerate(zip(points.tolist(), values.tolist(), strict=True)):
                write({"method": method, "step": j, "x": x, "y": y, "loss": value})
            write({"method": method, "log10_loss": float(np.log10(np.maximum(values[-1], TINY)))})


def _best(
    maker: Callable[[jax.Array], optax.GradientTransformation],
    rates: np.ndarray,
    start: jax.Array,
    settings: Settings,
) -> jax.Array:
    """The path whose rate reaches the lowest final value."""
    paths = jax.vmap(lambda rate: path(maker(rate), start, settings.num_steps))(jnp.asarray(rates))
    ends = jax.vmap(rosenbrock)(paths[:, -1])
    return paths[jnp.argmin(jnp.where(jnp.isfinite(ends), ends, jnp.inf))]


def _line(records: list[Record], method: str, seed: int, metric: str) -> list[float]:
    return [
        r.value for r in records if (r.labels["method"], r.seed, r.metric) == (method, seed, metric)
    ]


def _side(records: list[Record], seed: int, metric: str) -> tuple[float, float]:
    """The range of the seed's paths, with a margin; points beyond 10 left out."""
    found = np.array([r.value for r in records if r.metric == metric and r.seed == seed])
    found = np.append(found[np.abs(found) < 10], 1.3)
    return float(found.min()) - 0.2, float(found.max()) + 0.2


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the first seed's paths over contours, and all seeds' function values against steps."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    seeds = list(dict.fromkeys(r.seed for r in records))
    sides = [_side(records, seeds[0], metric) for metric in "xy"]
    x, y = np.meshgrid(*(np.linspace(*side, 200) for side in sides))
    values = (1 - x) ** 2 + 100 * (y - x**2) ** 2
    left.contour(x, y, values, levels=np.geomspace(0.1, 1000, 9), colors="0.8", linewidths=0.8)
    left.plot(1, 1, "k*", markersize=10)
    for i, method in enumerate(dict.fromkeys(r.labels["method"] for r in records)):
        points = [_line(records, method, seeds[0], metric) for metric in "xy"]
        left.plot(*points, ".-", color=f"C{i}", markersize=3, linewidth=0.8, label=method)
        for seed in seeds:
            right.plot(_line(records, method, seed, "loss"), color=f"C{i}", alpha=0.8)
    left.set(xlabel="x", ylabel="y", xlim=sides[0], ylim=sides[1])
    right.set(xlabel="steps", ylabel="function, each seed", yscale="log")
    right.set_ylim(bottom=1e-34)
    right.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize="small")
    return figure


def show(records: list[Record]) -> None:
    """Prints the final function values of each method, one per seed."""
    for method in dict.fromkeys(r.labels["method"] for r in records):
        ends = [
            _line(records, method, s, "loss")[-1] for s in dict.fromkeys(r.seed for r in records)
        ]
        print(f"{method:>34}: {', '.join(f'{value:.2g}' for value in ends)}")


def claims(summary: Summary) -> list[Claim]:
    """The preconditioner and the rate, against the methods that use only first derivatives."""
    ends = {r["method"]: r for r in summary.results if r["metric"] == "log10_loss"}

    def claim(low, high, says):
        test = evidence.less(ends.get(low), ends.get(high))
        return Claim(says, "Bae et al. 2022 (a picture)", f"log10 {test.text}", test.holds)

    return [
        claim(APO_RATE, GRADIENT_DESCENT, "the rate ends below gradient descent at its best rate"),
        claim(APO_DENSE, APO_RATE, "the preconditioner ends below the adapted rate"),
        claim(APO_DENSE, ADAM, "the preconditioner ends below Adam at its best rate"),
    ]


EXPERIMENT = Experiment(
    name="apo_rosenbrock",
    about="Paths of APO, gradient descent, Adam and Newton's method in Rosenbrock's valley.",
    settings=Settings,
    scales=SCALES,
    labels=("method",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "From 20 random starts and over 2000 steps, gradient descent at its best rate ends "
        "below the preconditioner, or the preconditioner below Adam at its best rate (p < "
        "0.05)."
    ),
)
