"""``global_lr``: the noise of the estimates along an episode, which grows for PES alone."""

import collections
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import curves, heat_map, training
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.problems import data, image_mlp
from unrollgrad.running import need
from unrollgrad.types import GradientEstimator, UnrolledProblem


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """One learning rate of an MLP: how noisy is each window's estimate of its gradient?

    Theta is the logarithm of the learning rate of SGD with momentum 0.9, and J is the mean training
    loss over an episode, on batches of its own. At a frozen theta many workers begin an episode
    together, and the standard deviation of their estimates is recorded in windows 1, 2, ... of it.
    Then theta is trained.
    """

    estimators: tuple[Literal["pes", "es_single", "gpes"], ...] = ("pes", "es_single", "gpes")
    """The estimators to run."""
    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The images. digits come with scikit-learn; the others are downloaded or read from files."""
    data_dir: Path | None = None
    """The folder that has MNIST's or FashionMNIST's files, or to which they are downloaded."""
    hidden: tuple[int, ...] = (16,)
    """Units of the MLP's hidden layers."""
    batch_size: int = 8
    """Images in a training batch."""
    evaluation_batch_size: int = 16
    """Images in a batch on which J is measured."""
    horizon: int = 500
    """Inner steps in an episode (T)."""
    truncation: int = 10
    """Inner steps in a window (K)."""
    noise_period: int = 100
    """Inner steps between two draws of gpes's noise."""
    num_pairs: int = 5
    """Antithetic pairs of a worker: half the papers' number of particles."""
    sigma: float = 0.1
    """Standard deviation of the perturbation."""
    frozen_learning_rate: float = 0.05
    """The learning rate at which the noise is measured: about the best constant one for cpu."""
    num_workers: int = 200
    """Workers whose estimates are compared."""
    start: float = 0.003
    """Initial learning rate; its logarithm is theta."""
    num_steps: int = 500
    """Outer updates, one window each."""
    learning_rate: float = 0.03
    """Adam's learning rate, constant."""
    cells: int = 16
    """Number of learning rates between 0.001 and 1 at which J is recorded."""
    num_episodes: int = 4
    """Episodes whose mean loss is J."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seed is a whole measurement and a whole run."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("pes", "es_single"),
        hidden=(4,),
        horizon=200,
        num_pairs=1,
        num_workers=20,
        num_steps=4,
        cells=3,
        num_episodes=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        data="mnist",
        hidden=(100, 100),
        batch_size=100,
        evaluation_batch_size=100,
        horizon=5000,
        noise_period=500,
        num_steps=5000,
        seeds=(0, 1, 2, 3),
    ),
}
"""The paper tunes sigma and Adam's learning rate and does not publish them."""

POINTS = 25
"""Points of each curve of training."""

NEAR = 0.05
"""How far above the least J of all constant rates training may end, as a fraction, to be near."""

RATIO = "pes / es_single"
"""The label, in place of an estimator's name, of the ratio of their standard deviations."""

RANGE = (1e-3, 1.0)
"""The range of the learning rates at which J is recorded."""


class Task(NamedTuple):
    """What all seeds share.

    Attributes:
        loss: J of stacked thetas.
        methods: The methods by name.
    """

    loss: Any
    methods: dict[str, training.Method]


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes J of constant rates (first seed only), every window's noise, and J along each run."""
    task = _prepare(settings.without_run())
    if seed == settings.seeds[0]:
        progress(heat_map.GRID, 0.0)
        thetas = np.log(np.geomspace(*RANGE, settings.cells))
        values = np.asarray(task.loss(jnp.asarray(thetas, jnp.float32)))
        for i, (theta, value) in enumerate(zip(thetas, values, strict=True)):
            write({"estimator": heat_map.GRID, "step": i, "J": value, "log_rate": theta})
        write({"estimator": heat_map.GRID, "minimum": np.nanmin(values)})
    key_noise, key_training = jax.random.split(jax.random.key(seed))
    frozen = jnp.log(jnp.float32(settings.frozen_learning_rate))
    windows = settings.horizon // settings.truncation
    noise = {}
    for i, (name, method) in enumerate(task.methods.items()):
        progress(f"{name}: noise", 0.5 * i / len(task.methods))
        sds = window_sds(method.estimator, windows, settings.num_workers, key_noise, frozen)
        noise[name] = np.asarray(sds)
        for window, sd in enumerate(noise[name], start=1):
            write({"estimator": name, "step": window, "sd": sd})
        write({"estimator": name, "slope": slope(noise[name])})
    if {"pes", "es_single"} <= set(noise):
        ratio = noise["pes"] / noise["es_single"]
        write({"estimator": RATIO, "slope": slope(ratio), "ratio": ratio[-1]})

    def evaluate(theta):
        return {"J": task.loss(theta[None])[0], "log_rate": theta}

    start = jnp.log(jnp.float32(settings.start))
    plan = training.Plan(task.methods, evaluate, POINTS)
    second_half = lambda text, done: progress(text, 0.5 + 0.5 * done)  # noqa: E731
    training.side_by_side(plan, key_training, start, write, second_half)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def window_sds(
    estimator: GradientEstimator, windows: int, num_workers: int, key: jax.Array, theta: jax.Array
) -> jax.Array:
    """The standard deviation over workers of each window's estimate, at a frozen scalar theta.

    Args:
        estimator: The estimator of one worker.
        windows: Number of windows from the start of an episode, which all workers begin together.
        num_workers: Number of independent workers.
        key: The key of all workers.
        theta: A scalar.

    Returns:
        Shape ``(windows,)``.
    """

    def window(states, i):
        keys = jax.random.split(jax.random.fold_in(key, i), num_workers)
        estimates, states = jax.vmap(estimator.estimate, (0, None, 0))(keys, theta, states)
        return states, jnp.std(estimates.grad, ddof=1)

    keys = jax.random.split(key, num_workers)
    states = jax.vmap(estimator.init, (0, None))(keys, theta)
    return jax.lax.scan(window, states, jnp.arange(windows))[1]


def slope(sds: np.ndarray) -> float:
    """The slope of log sd against log k, without the first fifth of k: 0.5 is growth like sqrt(k).

    In the first windows the network leaves its initial state, which changes every estimator's
    noise.
    """
    first = len(sds) // 5
    k = np.log(np.arange(first + 1, len(sds) + 1))
    return float(np.polyfit(k, np.log(sds[first:]), 1)[0])


@functools.lru_cache(maxsize=1)
def _prepare(settings: Settings) -> Task:
    problem = rate_problem(settings)
    common = {
        "truncation": settings.truncation,
        "sigma": settings.sigma,
        "num_pairs": settings.num_pairs,
        "noise_period": settings.noise_period,
    }
    names: tuple[str, ...] = settings.estimators
    methods = {
        name: training.Method(
            ug.REGISTRY[name].build(problem, **common),
            optax.adam(settings.learning_rate),
            settings.num_steps,
        )
        for name in names
    }
    keys = jax.random.split(jax.random.key(1000), settings.num_episodes)
    return Task(heat_map.mean_loss(problem, keys), methods)


def rate_problem(settings: Settings) -> UnrolledProblem:
    """The training of the MLP with a constant learning rate."""
    images = data.load(settings.data, settings.data_dir)
    draw = image_mlp.sampler(images.train, settings.evaluation_batch_size)
    return ug.training_problem(
        **image_mlp.task(images, settings.hidden, settings.batch_size),
        meta_loss=lambda theta, params, key: image_mlp.cross_entropy(params, draw(key)),
        optimizer=lambda theta, t: optax.sgd(jnp.exp(theta), momentum=0.9),
        horizon=settings.horizon,
    )


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the noise along an episode, J along the runs, and J of constant rates."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(15, 4.2), layout="constrained")
    noise, training_axis, grid_axis = figure.subplots(1, 3)
    runs = [r for r in records if r.labels["estimator"] not in (heat_map.GRID, RATIO)]
    for i, (name, sds) in enumerate(mean_sds(runs).items()):
        k = np.arange(1, len(sds) + 1)
        noise.plot(k, sds, color=f"C{i}", label=name)
        if name == "pes":
            first = len(k) // 5
            root = sds[first] * np.sqrt(k[first:] / k[first])
            noise.plot(k[first:], root, "k:", label=r"$\propto \sqrt{k}$")
    rate = config["frozen_learning_rate"]
    noise.set(
        xscale="log",
        yscale="log",
        xlabel="window k of an episode",
        ylabel="standard deviation of an estimate",
        title=f"noise at the frozen rate {rate:g}",
    )
    curves.plot(training_axis, runs, "J")
    training_axis.set(ylabel="J", title="training the rate")
    grid = curves.curves(records, "J", "log_rate").get(heat_map.GRID, {})
    for rates, values in grid.values():
        grid_axis.plot(np.exp(rates), values, "k.-")
    grid_axis.set(xscale="log", xlabel="learning rate", ylabel="J", title="J of constant rates")
    grid_axis.axvline(rate, color="black", ls=":", label="frozen rate")
    for axis in (noise, training_axis, grid_axis):
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def mean_sds(records: list[Record]) -> dict[str, np.ndarray]:
    """The mean over seeds of every window's standard deviation, by estimator."""
    found: dict[str, dict[int, list[float]]] = {}
    for r in records:
        if r.metric == "sd" and r.step is not None:
            line = found.setdefault(r.labels["estimator"], collections.defaultdict(list))
            line[r.step].append(r.value)
    return {
        name: np.array([np.mean(line[k]) for k in sorted(line)]) for name, line in found.items()
    }


def show(records: list[Record]) -> None:
    """Prints the growth of the noise, and J at the end of every run."""
    for name in dict.fromkeys(r.labels["estimator"] for r in records):
        values = [r.value for r in records if r.metric == "slope" and r.labels["estimator"] == name]
        if values:
            print(f"{name:>16}  noise ~ k^b, b by seed: " + "  ".join(f"{v:.2f}" for v in values))
    runs = [r for r in records if r.labels["estimator"] != heat_map.GRID]
    curves.show_last(runs, "J", "J at the end")


def claims(summary: Summary) -> list[Claim]:
    """The noise of PES grows along an episode, like sqrt(k) relative to the noise of ES-Single."""
    says: dict[str, tuple[str, Callable[[float, float], bool]]] = {
        "pes": ("grows along the episode: b > 0", lambda b, se: b > 2 * se),
        "es_single": ("does not grow: b < 0.1", lambda b, se: b + se < 0.1),
        RATIO: ("grows like sqrt(k): b is 0.5 within 0.1", lambda b, se: abs(b - 0.5) + se < 0.1),
    }
    out = []
    for name, (what, holds) in says.items():
        found = summary.find("slope", estimator=name)
        if found is None:
            continue
        b, se = found["mean"], found["se"]
        out.append(
            Claim(
                f"noise ~ k^b of {name} {what}",
                "Vicol et al. 2023" if name != RATIO else "sum of k independent draws",
                f"b = {curves.text(b, se or 0.0)}",
                None if se is None else holds(b, se),
            )
        )
    for name in ("pes", "es_single"):
        out += heat_map.ends_near(summary, name, NEAR, "Vicol et al. 2023")
    return out


EXPERIMENT = Experiment(
    name="global_lr",
    about="The noise of an estimate along an episode: PES's grows, ES-Single's does not.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a ResNet and CIFAR, ES-Single's noise grows along an episode of 1000 windows (b > "
        "0.1), or PES's does not grow, in ten seeds (p < 0.05)."
    ),
)
