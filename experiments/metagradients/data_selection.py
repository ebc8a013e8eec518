"""``data_selection``: how often each training image is used, when half of the labels are wrong."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.bilevel import data_cleaning
from experiments.metagradients import scores
from experiments.metagradients.digit_training import (
    Examples,
    Recipe,
    accuracy,
    draw_run,
    trained,
)
from unrollgrad.running import need

METAGRADIENT, RANDOM = "metagradient", "random"
INFLUENCE, ONCE = "influence in every step", "influence, once"
ALL, RIGHT, VALIDATION = "all images", "right labels only", "validation images only"

RECIPE = Recipe(output_scale=0.3, batch_size=100)
"""Smooth, and long enough to fit right labels; much smaller outputs would need more steps."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Counts of training images, updated by the signs of a score, as in metagradient descent.

    Half of the labels of the training images are wrong; the target is the loss on validation images
    with right labels. Each image has a count c, which begins at 1; a net is trained with weights
    c / mean(c). In every outer step a random part of the counts moves by 1, against the sign of the
    image's score: the metagradient of the target, its influence function, or a random number.
    Every outer step has new initial weights and batches. The usual selection by influence functions
    is there too: the images with the lowest scores, computed once, are kept.

    The influence functions get the damping, the probability that a count moves, and the share of
    the images that is kept, with which the test accuracy at the end is highest in each seed. They
    could not know that in practice. Metagradients have one setting, chosen on other seeds. The
    validation images are few, so that one would not train on them alone.
    """

    corruption: float = 0.5
    """Fraction of the training images whose label is replaced by a wrong one."""
    num_train: int = 1000
    """Number of training images; each has a count."""
    num_validation: int = 100
    """Number of images in the target; the rest of the 1797 digits are the test set."""
    num_steps: int = 80
    """Outer steps."""
    part: float = 0.2
    """The probability that a count moves in an outer step, by metagradients or at random."""
    influence_parts: tuple[float, ...] = (0.05, 0.1, 0.2)
    """Candidates for this probability where influence functions move the counts."""
    dampings: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Candidates for the damping of the influence functions."""
    kept: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8)
    """Candidates for the share of the images that is kept by influence functions, once."""
    num_nets: int = 8
    """Nets that are trained at the end, with new initial weights and batches."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws the three sets, the wrong labels and everything else."""


SCALES = {
    "smoke": Settings(
        scale="smoke", num_train=200, num_steps=8, dampings=(0.1,), num_nets=2, seeds=(0,)
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=200, num_nets=32, seeds=tuple(range(10))),
}


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the test accuracy along the outer steps and at the end, and of the references."""
    sets = data_cleaning.Settings(
        corruption=settings.corruption,
        num_train=settings.num_train,
        num_validation=settings.num_validation,
    )
    task = data_cleaning.task(sets, seed)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    plain = settings.without_run()
    tried = {
        METAGRADIENT: [(0.0, settings.part)],
        RANDOM: [(0.0, settings.part)],
        INFLUENCE: list(itertools.product(settings.dampings, settings.influence_parts)),
    }
    found: dict[str, Selection] = {}
    for i, (method, candidates) in enumerate(tried.items()):
        progress(method, i / len(tried))
        for candidate in candidates:
            counts, curve = map(np.asarray, _selected(plain, method, key, task, candidate))
            here = Selection(_mean_accuracy(settings, key, task, counts), counts, curve)
            found[method] = max(found.get(method, here), here, key=lambda each: each.accuracy)
    once = np.array([_once(plain, key, task, damping) for damping in settings.dampings])
    ranks = np.argsort(np.argsort(once, axis=1), axis=1)
    for counts in [rank < share * once.shape[1] for rank in ranks for share in settings.kept]:
        here = Selection(_mean_accuracy(settings, key, task, counts), counts, np.zeros(0))
        found[ONCE] = max(found.get(ONCE, here), here, key=lambda each: each.accuracy)
    for method, selection in found.items():
        _write(write, method, task, selection)
    everything, alone = np.ones(settings.num_train), task._replace(train=task.validation)
    references = {
        ALL: (task, everything),
        RIGHT: (task, everything - np.asarray(task.wrong)),
        VALIDATION: (alone, np.ones(settings.num_validation)),
    }
    accuracies = {name: _mean_accuracy(settings, key, *rest) for name, rest in references.items()}
    for name, value in accuracies.items():
        write({"method": name, "test_accuracy": value})
    for name, value in {**accuracies, **{m: s.accuracy for m, s in found.items()}}.items():
        if name != METAGRADIENT:
            write({"method": name, "gain": found[METAGRADIENT].accuracy - value})


class Selection(NamedTuple):
    """Counts that a method ended with.

    Attributes:
        accuracy: The test accuracy after training with them, a mean over nets.
        counts: A count for each training image.
        curve: The test accuracy in each outer step.
    """

    accuracy: float
    counts: np.ndarray
    curve: np.ndarray


def _write(write: Write, method: str, task: data_cleaning.Task, selection: Selection) -> None:
    """Writes the accuracies along the outer steps and at the end, and where the counts are."""
    accuracy, counts, curve = selection
    for step, value in enumerate([*curve.tolist(), accuracy]):
        write({"method": method, "step": step, "test_accuracy": value})
    wrong = float(np.sum(counts[np.asarray(task.wrong)]) / np.sum(counts))
    write({"method": method, "share_wrong": wrong, "share_unused": float(np.mean(counts == 0))})


@functools.partial(jax.jit, static_argnums=(0, 1))
def _selected(
    settings: Settings,
    method: str,
    key: jax.Array,
    task: data_cleaning.Task,
    candidate: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
    """The counts after all outer steps, and the test accuracy in each of them.

    A candidate is the damping of the influence functions, and the probability that a count moves.
    """
    damping, part = candidate
    target = jax.tree.map(lambda x: x[None], Examples(*task.validation))
    test = Examples(*task.test)

    def step(counts, i):
        key_run, key_part, key_sign = jax.random.split(jax.random.fold_in(key, i), 3)
        here = draw_run(RECIPE, Examples(*task.train), key_run)
        weights = counts / jnp.mean(counts)
        if method == METAGRADIENT:
            score = scores.exact(RECIPE, here, weights, target)[0]
        elif method == INFLUENCE:
            score = scores.influence(RECIPE, here, weights, target, damping)[0]
        else:
            score = jax.random.normal(key_sign, counts.shape)
        moved = jax.random.bernoulli(key_part, part, counts.shape)
        after = jnp.maximum(counts - jnp.sign(score) * moved, 0.0)
        return after, accuracy(RECIPE, trained(RECIPE, here, weights), test)

    return jax.lax.scan(step, jnp.ones(settings.num_train), jnp.arange(settings.num_steps))


@functools.partial(jax.jit, static_argnums=0)
def _once(
    settings: Settings, key: jax.Array, task: data_cleaning.Task, damping: float
) -> jax.Array:
    """The influence functions of the training images after training with all of them."""
    target = jax.tree.map(lambda x: x[None], Examples(*task.validation))
    here = draw_run(RECIPE, Examples(*task.train), key)
    return scores.influence(RECIPE, here, jnp.ones(settings.num_train), target, damping)[0]


def _mean_accuracy(
    settings: Settings, key: jax.Array, task: data_cleaning.Task, counts: np.ndarray
) -> float:
    """The test accuracy after training with these counts, a mean over nets."""
    keys = jax.random.split(jax.random.fold_in(key, settings.num_steps), settings.num_nets)
    return float(jnp.mean(_accuracies(keys, task, jnp.asarray(counts, jnp.float32))))


@jax.jit
def _accuracies(keys: jax.Array, task: data_cleaning.Task, counts: jax.Array) -> jax.Array:
    weights = counts / jnp.mean(counts)

    def one(key):
        here = draw_run(RECIPE, Examples(*task.train), key)
        return accuracy(RECIPE, trained(RECIPE, here, weights), Examples(*task.test))

    return jax.vmap(one)(keys)


METHODS = {METAGRADIENT: "C0", INFLUENCE: "C1", RANDOM: "C2"}
REFERENCES = {ONCE: "C6", ALL: "C3", RIGHT: "C4", VALIDATION: "C5"}


def _values(records: list[Record], method: str, metric: str) -> list[float]:
    """The last value of each seed."""
    found = {r.seed: r.value for r in records if (r.labels["method"], r.metric) == (method, metric)}
    return list(found.values())


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the test accuracy along the outer steps, and that of the references."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for method, color in METHODS.items():
        mine = [r for r in records if (r.labels["method"], r.metric) == (method, "test_accuracy")]
        seeds = {r.seed: [] for r in mine}
        for r in mine:
            seeds[r.seed].append(100 * r.value)
        curves = np.array(list(seeds.values()))
        for curve in curves:
            axis.plot(curve[:-1], color=color, alpha=0.3, linewidth=0.7)
        axis.plot(curves.mean(0)[:-1], color=color, linewidth=1.8, label=method)
    for method, color in REFERENCES.items():
        level = 100 * float(np.mean(_values(records, method, "test_accuracy")))
        axis.axhline(level, color=color, linestyle="--", linewidth=1, label=method)
    axis.set(xlabel="outer steps", ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    axis.set_title(f"digits, {100 * config['corruption']:g} % of the training labels wrong")
    figure.legend(loc="outside right center")
    return figure


def show(records: list[Record]) -> None:
    """Prints the accuracies at the end, and the share of the counts that is on wrong labels."""
    for method in (*METHODS, *REFERENCES):
        values = _values(records, method, "test_accuracy")
        line = f"{method:>23}: test accuracy {_text(values)} %"
        if method in (*METHODS, ONCE):
            line += f", of the counts {_text(_values(records, method, 'share_wrong'))} % on wrong "
            line += f"labels; {_text(_values(records, method, 'share_unused'))} % unused"
        print(line)


def _text(values: list[float]) -> str:
    se = f" ± {100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{se}"


def claims(summary: Summary) -> list[Claim]:
    """Metagradients select better than both baselines, and better than the clean images alone."""
    source, out = "Engstrom et al. 2025, on other data", []
    for other, says in {
        ONCE: "counts by metagradients give more test accuracy than selection by influence",
        INFLUENCE: "they give more test accuracy than counts by influence in every step",
        RANDOM: "they give more test accuracy than random counts",
        ALL: "they give more test accuracy than all images",
        VALIDATION: "they give more test accuracy than training on the validation images alone",
    }.items():
        if found := summary.find("gain", method=other):
            better = evidence.above(evidence.times(found, 100), 0.0)
            ours = f"{better.text} points more in the same seed"
            out.append(Claim(says, source, ours, better.holds))
    return out


EXPERIMENT = Experiment(
    name="data_selection",
    about="Counts of images, half of them with wrong labels, updated by signs of metagradients.",
    settings=Settings,
    scales=SCALES,
    labels=("method",),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a data set of 100,000 examples with natural noise, a selection by influence functions, "
        "made once, gives as high a test accuracy as counts by metagradients, in five seeds."
    ),
)
