"""``toy_regression``: a loss surface that only unbiased, smoothed gradients descend."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import curves, evidence, training
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from unrollgrad.running import need

ARRIVES = {
    "tbptt": False,
    "bptt": False,
    "forward_mode": False,
    "uoro": False,
    "truncated_es": False,
    "pes": True,
    "es_single": True,
    "full_es": True,
}
"""Whether the papers say that an estimator reaches the basin."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Train two learning rates of gradient descent on a wiggly function: who reaches the basin?

    The loss is the sum over an episode of 100 steps, as published. It is 2488 at the initial theta
    and 552 at the lowest point of a fine grid; the plateau in between ends in cliffs and wiggles.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. cpu: half of the published updates."""
    estimators: tuple[Literal[tuple(ARRIVES)], ...] = tuple(ARRIVES)  # type: ignore[valid-type]
    """The estimators to run."""
    num_steps: int = 10_000
    """Outer updates, one window each. Estimators that need whole episodes (bptt, full_es) make a
    tenth as many, with as many inner steps."""
    num_pairs: int = 50
    """Antithetic pairs of the evolution strategies: half the papers' number of particles."""
    sigma: float = 0.3
    """Standard deviation of the perturbation."""
    sigma_truncated: float = 1.0
    """Standard deviation for truncated_es, which stays on the plateau with a smaller one."""
    learning_rate: float = 1e-2
    """Learning rate of Adam with b1 = 0.99."""
    cells: int = 100
    """Points along each side of the loss surface in the picture."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed is a whole run. bptt, tbptt and forward_mode draw nothing: their runs are equal."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("tbptt", "es_single"),
        num_steps=600,
        num_pairs=20,
        learning_rate=0.1,
        cells=8,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=20_000, seeds=(0, 1, 2, 3, 4)),
}

POINTS = 50
"""Number of points of each curve."""
HORIZON, TRUNCATION = 100, 10
REACH = 5.0
"""The picture shows thetas between minus this and this."""
BASIN = 600.0
"""A theta whose loss is below this is in the basin."""


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the loss surface, with the first seed only, and theta and its loss along each run."""
    theta, methods = _prepare(settings.without_run())
    if seed == settings.seeds[0]:
        for i, loss in enumerate(surface(settings.cells).ravel()):
            write({"estimator": "surface", "step": i, "surface": round(float(loss), 1)})
    key = jax.random.key(seed)
    plan = training.Plan(methods, _evaluate, POINTS)
    training.side_by_side(plan, key, theta, write, progress)


@functools.lru_cache(maxsize=1)
def _prepare(settings: Settings) -> tuple[Any, dict[str, training.Method]]:
    problem, theta = ug.problems.toy_regression(HORIZON)
    optimizer = optax.adam(settings.learning_rate, b1=0.99)

    def method(name: str) -> training.Method:
        sigma = settings.sigma_truncated if name == "truncated_es" else settings.sigma
        estimator = ug.REGISTRY[name].build(
            problem, truncation=TRUNCATION, sigma=sigma, num_pairs=settings.num_pairs
        )
        windows = 1 if estimator.truncation else HORIZON // TRUNCATION
        return training.Method(estimator, optimizer, settings.num_steps // windows)

    return theta, {name: method(name) for name in settings.estimators}


def summed_loss(theta: jax.Array) -> jax.Array:
    """The sum of the step losses of an episode."""
    problem, _ = ug.problems.toy_regression(HORIZON)
    return HORIZON * ug.episode_loss(problem, jax.random.key(0), theta)


@jax.jit
def _evaluate(theta: jax.Array) -> dict[str, jax.Array]:
    return {"loss": summed_loss(theta), "theta0": theta[0], "theta1": theta[1]}


def surface(side: int) -> np.ndarray:
    """The summed loss on a grid of thetas; the first index belongs to theta[1]."""
    at = jnp.linspace(-REACH, REACH, side)
    rows = jax.vmap(jax.vmap(lambda y, x: summed_loss(jnp.stack([x, y])), (None, 0)), (0, None))
    return np.asarray(jax.jit(rows)(at, at))


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the first seed's paths over the loss surface, and the loss against updates."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(13, 5.5), layout="constrained")
    ways, lines = figure.subplots(1, 2)
    _draw_ways(figure, ways, records, config["cells"])
    curves.plot(lines, records, "loss")
    lines.axhline(BASIN, color="black", lw=0.8, ls=":")
    lines.set(
        xscale="log",
        yscale="log",
        xlabel="outer updates (of bptt and full_es: whole episodes)",
        ylabel="summed loss of an episode",
        title=f"loss of theta: {curves.seeds_of(records)}",
    )
    lines.legend(loc="lower left")
    return figure


def _draw_ways(figure: Any, axis: Any, records: list[Record], side: int) -> None:
    """Draws the surface, as far as it was computed, and theta along each estimator's first run."""
    losses = np.full(side * side, np.nan)
    for r in records:
        if r.metric == "surface" and r.step is not None:
            losses[r.step] = r.value
    norm = need("matplotlib.colors", "matplotlib").LogNorm(5e2, 1e4)
    at = np.linspace(-REACH, REACH, side)
    image = axis.pcolormesh(at, at, losses.reshape(side, side), norm=norm, cmap="Greys")
    figure.colorbar(image, ax=axis, label="summed loss of an episode")
    ends = curves.curves(records, "theta1", x="theta0")
    for name, (color, marker, dash) in curves.styles(ends).items():
        x, y = next(iter(ends[name].values()))
        axis.plot(x, y, dash, color=color, lw=1.2, label=name)
        axis.plot(x[-1], y[-1], marker, color=color, mec="white", ms=8)
    axis.set(
        xlabel="theta[0], log rate at the start",
        ylabel="theta[1], log rate at the end",
        title="ways of theta from (-4, -4), to the markers",
        xlim=(-REACH, REACH),
        ylim=(-REACH, REACH),
    )


def show(records: list[Record]) -> None:
    """Prints the last loss of every run."""
    curves.show_last(records, "loss", "summed loss at the end")


def claims(summary: Summary) -> list[Claim]:
    """Unbiased evolution strategies reach the basin; all other estimators do not."""
    out = []
    for name, arrives in ARRIVES.items():
        found = summary.find("loss", estimator=name)
        if found is None:
            continue
        says = f"{name} {'reaches' if arrives else 'does not reach'} the basin (below {BASIN:.0f})"
        finding = (evidence.below if arrives else evidence.above)(found, BASIN)
        ours = f"loss 2488 → {finding.text}"
        out.append(Claim(says, "Vicol et al. 2021, 2023", ours, finding.holds))
    return out


EXPERIMENT = Experiment(
    name="toy_regression",
    about="A loss surface of cliffs and wiggles, and the paths of theta over it.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
