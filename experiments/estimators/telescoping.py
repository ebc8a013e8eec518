"""``telescoping``: minimises the loss at the end of training window by window."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

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
from unrollgrad.types import UnrolledProblem


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Train two numbers of a learning-rate schedule for the loss at the end of an episode.

    The MLP and the schedule come from lr_schedule. J is the training loss of the last weights on a
    fixed batch. It is a telescoping sum: each window contributes the change of the loss within it.
    """

    estimators: tuple[Literal["pes", "es_single", "truncated_es", "full_es"], ...] = (
        "pes",
        "es_single",
        "truncated_es",
        "full_es",
    )
    """The estimators to run."""
    data: Literal["digits", "mnist", "fashion_mnist"] = "digits"
    """The images. digits come with scikit-learn; the others are downloaded or read from files."""
    data_dir: Path | None = None
    """The folder that has MNIST's or FashionMNIST's files, or to which they are downloaded."""
    hidden: tuple[int, ...] = (16,)
    """Units of the MLP's hidden layers."""
    batch_size: int = 8
    """Images in a training batch."""
    fixed_batch_size: int = 200
    """Training images in the fixed batch."""
    horizon: int = 200
    """Inner steps in an episode (T)."""
    truncation: int = 10
    """Inner steps in a window (K)."""
    start: tuple[float, float] = (0.003, 30.0)
    """Initial theta0 and theta1."""
    num_steps: int = 2000
    """Outer updates, one window each; full_es makes fewer, with as many inner steps."""
    num_pairs: int = 20
    """Antithetic pairs: half the papers' number of particles."""
    sigma: float = 0.1
    """Standard deviation of the perturbation."""
    learning_rate: float = 0.02
    """Adam's learning rate at the beginning, for estimators of windows."""
    full_es_learning_rate: float = 0.3
    """Adam's learning rate at the beginning, for full_es."""
    final_fraction: float = 0.0
    """The share of both learning rates that a cosine decay leaves."""
    cells: tuple[int, int] = (11, 9)
    """Number of values of theta0 and of theta1 on the grid that the picture shows."""
    num_episodes: int = 16
    """Episodes whose mean loss is J on the grid; 64 others measure the runs and the minimum."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed is a whole run."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        estimators=("pes", "es_single"),
        hidden=(4,),
        fixed_batch_size=20,
        horizon=20,
        num_steps=8,
        num_pairs=2,
        cells=(2, 3),
        num_episodes=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        data="fashion_mnist",
        hidden=(100, 100),
        batch_size=100,
        fixed_batch_size=1000,
        horizon=5000,
        num_steps=5000,
        num_pairs=500,
        learning_rate=0.01,
        full_es_learning_rate=0.1,
        final_fraction=1.0,
        cells=(31, 25),
        seeds=(0, 1, 2, 3),
    ),
}
"""The paper does not publish horizon, rates and particles; these come from lr_schedule."""

POINTS = 25
"""Number of points of each curve."""

RANGES = ((1e-3, 1.0), (0.3, 100.0))
"""Ranges of theta0 and theta1 on the grid."""

NEAR = 0.3
"""How far above the grid's minimum (about 0.1) J may end, as a fraction of it, to be near."""

FAR = 1.0
"""How far above the grid's minimum J must end, as a fraction of it, to be far."""


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes J on the grid, with the first seed only, and J and the roughness of each run."""
    objective, methods = _prepare(settings.without_run())
    if seed == settings.seeds[0]:
        progress(heat_map.GRID, 0.0)
        heat_map.write_grid(objective, heat_map.logarithms(RANGES, settings.cells), write)
    ways: dict[str, list[list[float]]] = {name: [] for name in methods}

    def write_and_keep(numbers: dict[str, Any]) -> None:
        ways[numbers["estimator"]].append([float(numbers[name]) for name in heat_map.NAMES])
        write(numbers)

    def evaluate(theta):
        return {"J": objective.fresh(theta[None])[0], **heat_map.named(theta)}

    key, theta = jax.random.key(seed), jnp.log(jnp.array(settings.start))
    plan = training.Plan(methods, evaluate, POINTS)
    training.side_by_side(plan, key, theta, write_and_keep, progress)
    for name, way in ways.items():
        write({"estimator": name, "roughness": roughness(np.array(way))})


def roughness(way: np.ndarray) -> float:
    """The root mean square of the second differences along a path of shape (points, dim)."""
    return float(np.sqrt(np.mean(np.sum(np.diff(way, n=2, axis=0) ** 2, axis=1))))


@functools.lru_cache(maxsize=1)
def _prepare(settings: Settings) -> tuple[heat_map.Objective, dict[str, training.Method]]:
    problem = final_problem(settings)
    common = {
        "truncation": settings.truncation,
        "sigma": settings.sigma,
        "num_pairs": settings.num_pairs,
    }
    names: tuple[str, ...] = settings.estimators
    methods = {}
    for name in names:
        whole = name == "full_es"
        count = settings.num_steps * (settings.truncation if whole else 1)
        count = max(1, count // (settings.horizon if whole else 1))
        rate = settings.full_es_learning_rate if whole else settings.learning_rate
        schedule = optax.cosine_decay_schedule(rate, count, settings.final_fraction)
        estimator = ug.REGISTRY[name].build(problem, **common)
        methods[name] = training.Method(estimator, optax.adam(schedule), count)
    return heat_map.objective(problem, settings.num_episodes), methods


def final_problem(settings: Settings) -> UnrolledProblem:
    """The training of the MLP; its only loss is the loss of the last weights on the fixed batch."""
    images = data.load(settings.data, settings.data_dir)
    count = settings.fixed_batch_size
    fixed = jnp.asarray(images.train.images[:count]), jnp.asarray(images.train.labels[:count])
    problem = ug.training_problem(
        **image_mlp.task(images, settings.hidden, settings.batch_size),
        meta_loss=lambda theta, params, key: jnp.float32(0),
        optimizer=lambda theta, t: image_mlp.decaying_sgd(theta, t, settings.horizon),
        horizon=settings.horizon,
    )
    return ug.final_loss(
        problem, lambda key, theta, state: image_mlp.cross_entropy(state.params, fixed)
    )


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws J over theta with the paths of the runs, and J along the runs."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    heat_map.draw(left, records, (r"$\theta_0$", r"$\theta_1$"), "J: training loss at the end")
    curves.plot(right, heat_map.runs(records), "J", "inner_steps")
    for r in records:
        if r.metric == "minimum":
            right.axhline(r.value, color="black", ls=":", label="minimum of the grid")
    right.set(ylabel="J", title=f"loss after {config['horizon']} steps", yscale="log")
    right.legend()
    return figure


def show(records: list[Record]) -> None:
    """Prints J at the end of every run."""
    for r in records:
        if r.metric == "minimum":
            print(f"the minimum of the grid is {r.value:.3g}")
    curves.show_last(heat_map.runs(records), "J", "J at the end")


def claims(summary: Summary) -> list[Claim]:
    """Persistent estimators find the least final loss; truncated ES looks one window ahead."""
    theory = "the sum over windows is the loss at the end"
    return [
        *heat_map.ends_near(summary, "pes", NEAR, theory),
        *heat_map.ends_near(summary, "es_single", NEAR, theory),
        *heat_map.ends_near(summary, "full_es", NEAR, theory),
        *heat_map.ends_far(summary, "truncated_es", FAR, "Vicol et al. 2023"),
        curves.compare(
            summary,
            curves.Comparison(
                "roughness",
                "es_single",
                "<",
                "pes",
                "es_single's way is smoother than pes's",
                "Vicol et al. 2023",
                "roughness ",
            ),
        ),
    ]


EXPERIMENT = Experiment(
    name="telescoping",
    about="The loss at the end of training, as a sum of its changes in all windows.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
