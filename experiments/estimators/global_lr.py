"""``global_lr``: the noise of the estimates along an episode, which grows for PES alone."""

import collections
import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import curves, evidence, heat_map, training
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
    Then theta is trained, and its spread over the second half of the training is recorded.
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
    num_episodes: int = 16
    """Episodes whose mean loss is J of constant rates; 64 others measure the runs and the least."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
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

RATIO = "pes / es_single"
"""The label, in place of an estimator's name, of the ratio of their standard deviations."""

RANGE = (1e-3, 1.0)
"""The range of the learning rates at which J is recorded."""


class Task(NamedTuple):
    """What all seeds share.

    Attributes:
        objective: J of stacked thetas.
        methods: The methods by name.
    """

    objective: heat_map.Objective
    methods: dict[str, training.Method]


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes J of constant rates (first seed only), every window's noise, and J along each run."""
    task = _prepare(settings.without_run())
    if seed == settings.seeds[0]:
        progress(heat_map.GRID, 0.0)
        rates = np.log(np.geomspace(*RANGE, settings.cells))
        heat_map.write_grid(task.objective, {"log_rate": rates}, write)
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

    ways: dict[str, list[float]] = {name: [] for name in task.methods}

    def evaluate(theta):
        return {"J": task.objective.fresh(theta[None])[0], "log_rate": theta}

    def write_and_keep(numbers: dict[str, Any]) -> None:
        ways[numbers["estimator"]].append(float(numbers["log_rate"]))
        write(numbers)

    start = jnp.log(jnp.float32(settings.start))
    plan = training.Plan(task.methods, evaluate, POINTS)
    second_half = lambda text, done: progress(text, 0.5 + 0.5 * done)  # noqa: E731
    training.side_by_side(plan, key_training, start, write_and_keep, second_half)
    for name, way in ways.items():
        write({"estimator": name, "spread": spread(np.array(way))})


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


def spread(way: np.ndarray) -> float:
    """The standard deviation of the log rate over the second half of its points."""
    return float(np.std(way[len(way) // 2 :], ddof=1))


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
    return Task(heat_map.objective(problem, settings.num_episodes), methods)


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
    """Draws the noise along an episode, the rate and J along the runs, and J of constant rates."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(12, 8), layout="constrained")
    (noise, way), (training_axis, grid_axis) = figure.subplots(2, 2)
    runs = [r for r in records if r.labels["estimator"] not in (heat_map.GRID, RATIO)]
    rate = config["frozen_learning_rate"]
    _draw_noise(noise, runs, rate)
    curves.plot(way, runs, "log_rate")
    way.set(ylabel="ln learning rate", title="training the rate")
    curves.plot(training_axis, runs, "J")
    training_axis.set(ylabel="J", title="J on fresh episodes")
    for r in records:
        if r.metric == "minimum":
            training_axis.axhline(r.value, color="black", ls=":", label="best constant rate")
    grid = curves.curves(records, "J", "log_rate").get(heat_map.GRID, {})
    for rates, values in grid.values():
        grid_axis.plot(np.exp(rates), values, "k.-", label="constant rates")
    grid_axis.set(xscale="log", xlabel="learning rate", ylabel="J", title="J of constant rates")
    grid_axis.axvline(rate, color="black", ls=":", label="frozen rate of the noise")
    for axis in (noise, way, training_axis, grid_axis):
        axis.grid(alpha=0.3)
        axis.legend()
    return figure


def _draw_noise(axis: Any, records: list[Record], rate: float) -> None:
    """Draws every window's standard deviation: the mean over seeds in a band of one error."""
    found = sds_by_seed(records)
    for (name, sds), style in zip(found.items(), curves.styles(found).values(), strict=True):
        k, mean = np.arange(1, sds.shape[1] + 1), sds.mean(axis=0)
        axis.plot(k, mean, color=style.color, label=name)
        if len(sds) > 1:
            se = sds.std(axis=0, ddof=1) / np.sqrt(len(sds))
            axis.fill_between(k, mean - se, mean + se, color=style.color, alpha=0.2, lw=0)
        if name == "pes":
            first = len(k) // 5
            root = mean[first] * np.sqrt(k[first:] / k[first])
            axis.plot(k[first:], root, "k:", label=r"$\propto \sqrt{k}$")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="window k of an episode",
        ylabel="standard deviation of an estimate",
        title=f"noise at the frozen rate {rate:g}",
    )


def sds_by_seed(records: list[Record]) -> dict[str, np.ndarray]:
    """Every window's standard deviation, of shape (seeds, windows), by estimator."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for r in records:
        if r.metric == "sd" and r.step is not None:
            line = found.setdefault(r.labels["estimator"], collections.defaultdict(dict))
            line[r.seed][r.step] = r.value
    return {
        name: np.array([[sds[k] for k in sorted(sds)] for sds in line.values()])
        for name, line in found.items()
    }


def show(records: list[Record]) -> None:
    """Prints the growth of the noise, the rate's spread, and J at the end of every run."""
    for name in dict.fromkeys(r.labels["estimator"] for r in records):
        values = [r.value for r in records if r.metric == "slope" and r.labels["estimator"] == name]
        if values:
            print(f"{name:>16}  noise ~ k^b, b by seed: " + "  ".join(f"{v:.2f}" for v in values))
    runs = [r for r in records if r.labels["estimator"] != heat_map.GRID]
    curves.show_last(runs, "spread", "spread of ln rate")
    curves.show_last(runs, "J", "J at the end")


def claims(summary: Summary) -> list[Claim]:
    """The noise of PES grows along an episode, and with it the spread of the rate that it trains.

    Relative to the noise of ES-Single it grows like sqrt(k).
    """
    paper, theory = "Vicol et al. 2023", "sum of k independent draws"
    found = {name: summary.find("slope", estimator=name) for name in ("pes", "es_single", RATIO)}
    ratio = evidence.within(found[RATIO], 0.4, 0.6)
    growing = {
        f"{RATIO} grows like sqrt(k): b is 0.5 within 0.1": (theory, ratio),
        "pes grows along the episode: b > 0": (paper, evidence.above(found["pes"], 0.0)),
        "es_single does not grow: b < 0.1": (paper, evidence.below(found["es_single"], 0.1)),
    }
    out = [
        Claim(f"noise ~ k^b of {says}", source, f"b = {finding.text}", finding.holds)
        for says, (source, finding) in growing.items()
    ]
    says = "es_single's rate spreads less than pes's in the second half of its training"
    spreads = curves.Comparison("spread", "es_single", "<", "pes", says, paper, "sd of ln rate ")
    return [*out, curves.compare(summary, spreads)]


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
)
