"""``schedule_by_metagradient``: a flat learning rate becomes a schedule, against a grid."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.metagradients.digit_training import (
    Examples,
    Params,
    Recipe,
    accuracy,
    cross_entropies,
    digits,
    init_params,
)
from unrollgrad.running import need
from unrollgrad.types import Key
from unrollgrad.types import UnrolledProblem as Problem

FLAT, LEARNED, BEST_FLAT = "flat", "metagradients", "best flat rate"
GRID, FALLING = "best of the grid", "best, no warm-up"

RECIPE = Recipe(output_scale=1.0, batch_size=100)


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """The learning rates of SGD with momentum, a piecewise-linear schedule of several knots.

    An MLP is trained on digits. The knots begin at one flat rate, and Adam moves their logarithms
    by metagradients of the validation loss at the end of the training. The grid are one-cycle
    schedules: the rate rises linearly to a peak and falls linearly to a 1000th of it. The grid's
    best is chosen by the mean validation loss over other nets than those of the comparison, and so
    is the best of its schedules that only fall, which shows whether a warm-up helps at all.

    The flat rate at the beginning trains well already: from one that is far too low, the outer
    steps are spent on raising all knots together. It was chosen on other seeds.
    """

    horizon: int = 100
    """Training steps."""
    num_knots: int = 11
    """Knots of the schedule."""
    start: float = 0.1
    """The flat learning rate at which the knots begin."""
    num_steps: int = 80
    """Outer steps."""
    num_workers: int = 8
    """Trainings in an outer step, each with new initial weights and batches."""
    learning_rate: float = 0.1
    """Learning rate of the outer Adam, on the logarithms of the rates; it falls to 0 (a cosine)."""
    num_peaks: int = 16
    """Peaks in the grid, and flat rates, from 0.003 to 3."""
    num_warmups: int = 10
    """In the grid, the positions of the peak, as fractions of the training."""
    num_chosen_by: int = 6
    """Nets that choose from the grid."""
    num_nets: int = 32
    """Nets of the comparison."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws all nets and batches."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        horizon=20,
        num_knots=3,
        num_steps=5,
        num_workers=2,
        num_peaks=2,
        num_warmups=2,
        num_chosen_by=1,
        num_nets=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper", horizon=1000, num_peaks=100, num_warmups=20, seeds=tuple(range(10))
    ),
}


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the loss and the accuracy of every schedule, and its knots."""
    plain, key = settings.without_run(), jax.random.key(seed)
    choose, compare, learn = (jax.random.fold_in(key, i) for i in range(3))
    rates = np.geomspace(0.003, 3.0, settings.num_peaks)
    cells = _cells(settings, rates)
    tried = {
        GRID: np.array([one_cycle(settings, *each) for each in cells]),
        FALLING: np.array([one_cycle(settings, *each) for each in cells if each[1] == 0]),
        BEST_FLAT: np.tile(rates[:, None], settings.num_knots),
    }
    knots = {FLAT: np.full(settings.num_knots, settings.start)}
    trainings = {FLAT: 0, LEARNED: settings.num_steps * settings.num_workers}
    for i, (name, some) in enumerate(tried.items()):
        progress(name, 0.2 * i)
        knots[name] = some[np.argmin(_losses(plain, choose, jnp.log(some)))]
        trainings[name] = len(some) * settings.num_chosen_by
    progress(LEARNED, 0.6)
    knots[LEARNED] = np.exp(_learned(settings, learn))
    progress("comparison", 0.9)
    found = {
        name: dict(zip(MEASURES, map(float, _ends(plain, compare, jnp.log(x))), strict=True))
        for name, x in knots.items()
    }
    for name, numbers in found.items():
        gain = found[LEARNED]["test_accuracy"] - numbers["test_accuracy"]
        shape = {
            "rise": max(knots[name]) / knots[name][0],
            "fall": max(knots[name]) / knots[name][-1],
        }
        write({"schedule": name, "trainings": trainings[name], "gain": gain, **numbers, **shape})
        for i, rate in enumerate(knots[name].tolist()):
            write({"schedule": name, "step": i, "rate": rate})


def _cells(settings: Settings, rates: np.ndarray) -> list[tuple[float, float]]:
    warmups = np.linspace(0.0, 0.9, settings.num_warmups)
    return [(float(a), float(b)) for a, b in itertools.product(rates, warmups)]


def one_cycle(settings: Settings, peak: float, warmup: float) -> np.ndarray:
    """Knots that rise linearly from a 25th of the peak, and fall to a 1000th of it.

    Without a warm-up they begin at the peak.
    """
    places = np.linspace(0, 1, settings.num_knots)
    if warmup == 0:
        return np.interp(places, [0.0, 1.0], [peak, peak / 1000])
    return np.interp(places, [0.0, warmup, 1.0], [peak / 25, peak, peak / 1000])


def problem_of(settings: Settings, measure: Callable[[Params, Examples], jax.Array]) -> Problem:
    """Training of the MLP; theta are the logarithms of the knots.

    J is ``measure`` of the trained net on the first half of the validation images.
    """
    (images, labels), validation = digits()
    places = jnp.arange(settings.num_knots) * settings.horizon / (settings.num_knots - 1)

    def loss(theta, params, rows, key):
        return jnp.mean(cross_entropies(RECIPE, params, Examples(images[rows], labels[rows])))

    problem = ug.training_problem(
        loss=loss,
        init_params=lambda key: init_params(RECIPE, key),
        optimizer=lambda theta, t: optax.sgd(
            jnp.exp(jnp.interp(t + 0.5, places, theta)), momentum=0.9
        ),
        sample_batch=lambda key: jax.random.randint(key, (RECIPE.batch_size,), 0, len(labels)),
        meta_loss="before",
        horizon=settings.horizon,
    )
    return ug.final_loss(problem, lambda key, theta, s: measure(s.params, validation))


def _half(split: Examples, part: int) -> Examples:
    """The validation images of the objective (0), or those of the test (1)."""
    return Examples(*(x[part::2] for x in split))


MEASURES: dict[str, Callable[[Params, Examples], jax.Array]] = {
    "loss": lambda params, all: jnp.mean(cross_entropies(RECIPE, params, _half(all, 0))),
    "test_loss": lambda params, all: jnp.mean(cross_entropies(RECIPE, params, _half(all, 1))),
    "test_accuracy": lambda params, all: accuracy(RECIPE, params, _half(all, 1)),
}


def _learned(settings: Settings, key: Key) -> np.ndarray:
    """The knots after all outer steps."""
    estimator = ug.average(ug.bptt(problem_of(settings, MEASURES["loss"])), settings.num_workers)
    start = jnp.full(settings.num_knots, jnp.log(settings.start))
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.learning_rate, settings.num_steps))
    fitted = ug.fit(estimator, start, optimizer, num_steps=settings.num_steps, key=key)
    return np.asarray(fitted.theta)


@functools.partial(jax.jit, static_argnums=0)
def _losses(settings: Settings, key: Key, knots: jax.Array) -> jax.Array:
    """The mean validation loss of each row of knots; all rows train the same nets."""
    problem = problem_of(settings, MEASURES["loss"])

    def of(theta, key):
        return ug.episode_loss(problem, key, theta)

    keys = jax.random.split(key, settings.num_chosen_by)
    found = jax.lax.map(lambda theta: jnp.mean(jax.vmap(lambda k: of(theta, k))(keys)), knots)
    return jnp.where(jnp.isnan(found), jnp.inf, found)  # a rate that is too high


@functools.partial(jax.jit, static_argnums=0)
def _ends(settings: Settings, key: Key, theta: jax.Array) -> jax.Array:
    """Every measure's mean over the nets of the comparison; they are trained once for all."""

    def one(key, i):
        def measure(params, images):
            return jnp.stack([measure(params, images) for measure in MEASURES.values()])[i]

        return ug.episode_loss(problem_of(settings, measure), key, theta)

    keys = jax.random.split(key, settings.num_nets)
    found = jax.vmap(lambda key: jax.vmap(lambda i: one(key, i))(jnp.arange(len(MEASURES))))(keys)
    return jnp.mean(found, axis=0)


STYLES = {FLAT: "C7", LEARNED: "C0", GRID: "C1", FALLING: "C3", BEST_FLAT: "C2"}


def _values(records: list[Record], schedule: str, metric: str) -> list[float]:
    return [r.value for r in records if r.labels["schedule"] == schedule and r.metric == metric]


def _shown(records: list[Record]) -> dict[str, str]:
    """The schedules that a record has, and their colours; older ones have fewer."""
    names = {r.labels["schedule"] for r in records}
    return {name: color for name, color in STYLES.items() if name in names}


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the schedules of all seeds, and their test accuracies."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    seeds, styles = sorted({r.seed for r in records}), _shown(records)
    for name, color in styles.items():
        for i, seed in enumerate(seeds):
            mine = [r for r in records if r.seed == seed and r.labels["schedule"] == name]
            rates = [r.value for r in mine if r.metric == "rate"]
            places = np.linspace(0, config["horizon"], len(rates))
            left.plot(places, rates, color=color, alpha=0.8, lw=1, label=None if i else name)
    left.set(xlabel="training step", ylabel="learning rate", yscale="log")
    left.grid(alpha=0.3)
    left.legend(fontsize="small")
    for i, (name, color) in enumerate(styles.items()):
        values = 100 * np.array(_values(records, name, "test_accuracy"))
        right.plot([i] * len(values), values, "o", color=color, alpha=0.6)
        right.plot([i - 0.2, i + 0.2], [values.mean()] * 2, color=color)
    right.set_xticks(range(len(styles)), [name.replace(" ", "\n", 1) for name in styles])
    right.tick_params(axis="x", labelsize="small")
    right.set(ylabel="test accuracy, %")
    right.grid(alpha=0.3, axis="y")
    return figure


def show(records: list[Record]) -> None:
    """Prints the losses, accuracies and the trainings that each schedule took."""
    for name in _shown(records):
        loss, accuracies = (_values(records, name, m) for m in ("test_loss", "test_accuracy"))
        trainings = _values(records, name, "trainings")[0]
        rise, fall = (np.mean(_values(records, name, metric)) for metric in ("rise", "fall"))
        se = np.std(accuracies, ddof=1) / len(accuracies) ** 0.5 if len(accuracies) > 1 else 0.0
        print(
            f"{name:>16}: test loss {np.mean(loss):.4f}, accuracy {100 * np.mean(accuracies):.2f} "
            f"± {100 * se:.2f} %; {trainings:.0f} trainings; the rate's highest is {rise:.1f} "
            f"times its first, {fall:.1f} times its last"
        )


def claims(summary: Summary) -> list[Claim]:
    """The flat schedule becomes one that rises and falls, and it is as good as a grid's best."""
    source = "Engstrom et al. 2025, on CIFAR-10"

    def find(metric, schedule):
        return summary.find(metric, schedule=schedule)

    rise, fall = (find(metric, LEARNED) for metric in ("rise", "fall"))
    if not (rise and fall):
        return []
    shape = evidence.above(rise, 1.2), evidence.above(fall, 1.2)
    out = [
        Claim(
            "a flat schedule becomes a cycle: its peak is over 1.2 times its first and last rate",
            source,
            f"times the first: {shape[0].text}; times the last: {shape[1].text}",
            evidence.both(*shape),
        )
    ]
    for name, least, says in (
        (FLAT, 0.0, "it gives more test accuracy than the flat schedule it began as"),
        (BEST_FLAT, 0.0, "it gives more test accuracy than the best flat rate"),
        (GRID, -0.5, "it is at most half a point of test accuracy below the grid's best"),
    ):
        if found := find("gain", name):
            test = evidence.above(evidence.times(found, 100), least)
            out.append(Claim(says, source, f"{test.text} points more", test.holds))
    return out


EXPERIMENT = Experiment(
    name="schedule_by_metagradient",
    about="A flat learning rate becomes a schedule by metagradients, against a grid.",
    settings=Settings,
    scales=SCALES,
    labels=("schedule",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On CIFAR-10, in five seeds, 50 outer steps from a flat schedule end over half a point of "
        "test accuracy below the best of 1000 one-cycle schedules."
    ),
)
