"""``distillation``: learns ten images such that a classifier trained on them knows digits."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.bilevel.data_cleaning import (
    Classifier,
    Data,
    accuracy,
    cross_entropies,
    digits,
    minimise,
    points,
    zeros,
)
from unrollgrad.running import need

SOLVERS: dict[str, Callable[[int], Any]] = {
    "identity": lambda steps: ug.implicit.identity(),
    "CG": lambda steps: need("lineax", "lineax").CG(rtol=1e-3, atol=1e-3, max_steps=steps),
}


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Dataset distillation: learns one image for each digit, with a linear classifier.

    The inner loss is the cross-entropy on the ten images plus exp(log_decay) |w|^2. Each outer step
    of RMSprop follows five warm-started inner steps of Adam; the images start at zero. These
    choices are the paper's. The paper uses batches of 100 from MNIST; here the outer loss is on
    all ``num_train`` images of scikit-learn's digits, at every scale.
    """

    solvers: tuple[Literal["identity", "CG"], ...] = ("identity", "CG")
    """Approximations of the inverse Hessian. The paper uses the identity."""
    num_train: int = 1200
    """Number of real images in the outer loss; the rest of the 1797 images are held out."""
    log_decay: float = -4.0
    """Logarithm of the coefficient of |w|^2 in the inner loss."""
    inner_steps: int = 5
    """Inner steps per outer step; they start from the previous inner parameters."""
    inner_learning_rate: float = 0.05
    """Learning rate of the inner Adam."""
    cg_steps: int = 20
    """Maximum number of conjugate-gradient steps in each hypergradient."""
    num_steps: int = 1000
    """Number of outer steps."""
    learning_rate: float = 1e-2
    """Learning rate of the outer RMSprop."""
    num_draws: int = 20
    """Number of random draws of ten real images, for the baseline."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws the training set and the held-out set."""


SCALES = {
    "smoke": Settings(scale="smoke", num_steps=120, num_draws=4, seeds=(0,)),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=10_000, seeds=tuple(range(10))),
}

POINTS = 20
"""Approximate number of points on each curve."""

FACTORS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)
"""Scales of the class means; the scale with the lowest loss on real training images is used.

Learned images choose their scale too, and it acts like a change of the decay.
"""

REFERENCES = {"class means": "C2", "random images": "C3"}
"""Baselines of the curves, with their colours."""


def inner(params: Classifier, images: jax.Array, log_decay: float) -> jax.Array:
    """The loss of a classifier on ten images, one for each digit."""
    fit = jnp.mean(cross_entropies(params, Data(images, jnp.arange(10))))
    return fit + math.exp(log_decay) * optax.tree.norm(params, squared=True)


def distil(settings: Settings, train: Data, solver: str) -> "ug.bilevel.BilevelResult":
    """Learns the images, starting from zero."""

    def loss(params, theta):
        return inner(params, theta, settings.log_decay)

    def outer(params, theta):
        return jnp.mean(cross_entropies(params, train))

    return ug.bilevel.solve(
        loss,
        ug.implicit.hypergradient(outer, loss, solver=SOLVERS[solver](settings.cg_steps)),
        zeros(),
        jnp.zeros((10, 64)),
        inner_optimizer=optax.adam(settings.inner_learning_rate),
        inner_steps=settings.inner_steps,
        outer_optimizer=optax.rmsprop(settings.learning_rate),
        num_steps=settings.num_steps,
        every=_every(settings.num_steps),
    )


def class_means(data: Data) -> jax.Array:
    """The mean image of each digit."""
    which = jax.nn.one_hot(data.labels, 10, axis=0)
    return which @ data.images / jnp.sum(which, 1, keepdims=True)


def random_images(key: jax.Array, data: Data) -> jax.Array:
    """A random image of each digit."""
    order = jax.random.permutation(key, len(data.labels))
    shuffled = data.labels[order]
    first = jnp.argmax(shuffled == jnp.arange(10)[:, None], 1)
    return data.images[order[first]]


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the images, and held-out accuracies of classifiers trained on them from zero."""
    split, draws = jax.random.split(jax.random.key(seed))
    train, test = digits(split, settings.num_train)

    @jax.jit
    def evaluate(sets):
        def one(images):
            params = minimise(lambda p: inner(p, images, settings.log_decay), 100)
            return accuracy(params, test), jnp.mean(cross_entropies(params, train))

        return jax.lax.map(one, sets)

    def put(series, **numbers):
        write({"series": series, "image": "", **numbers})

    progress("references", 0.0)
    means = class_means(train)
    scaled = jnp.array(FACTORS)[:, None, None] * means
    keys = jax.random.split(draws, settings.num_draws)
    random = jax.vmap(lambda key: random_images(key, train))(keys)
    accuracies, losses = map(np.asarray, evaluate(jnp.concatenate([scaled, random])))
    over_means = float(accuracies[np.argmin(losses[: len(FACTORS)])])
    over_random = float(np.mean(accuracies[len(FACTORS) :]))
    put("class means", accuracy=over_means)
    put("random images", accuracy=over_random)
    first = seed == settings.seeds[0]
    if first:
        _write_images("class means", means, write)
    for i, name in enumerate(settings.solvers):
        progress(name, (i + 1) / (len(settings.solvers) + 1))
        result = distil(settings, train, name)
        accuracies, losses = evaluate(result.thetas)
        warm = jax.vmap(lambda params: accuracy(params, test))(result.paths)
        for j in range(len(accuracies)):
            put(
                name,
                step=(j + 1) * _every(settings.num_steps),
                accuracy=float(accuracies[j]),
                outer_loss=float(losses[j]),
                accuracy_warm=float(warm[j]),
            )
        end = float(accuracies[-1])
        put(f"{name}, gain", over_random=end - over_random, over_means=end - over_means)
        if first:
            _write_images(name, result.thetas[-1], write)


def _write_images(series: str, images: jax.Array, write: Write) -> None:
    """Writes the ten images of a series, pixel by pixel."""
    for label, image in enumerate(images):
        for i, pixel in enumerate(image):
            write({"series": series, "image": str(label), "step": i, "pixel": float(pixel)})


def _every(num_steps: int) -> int:
    """The outer steps between points of a curve; it divides ``num_steps``."""
    return next(n for n in range(max(num_steps // POINTS, 1), num_steps + 1) if num_steps % n == 0)


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the images, and accuracies against outer steps.

    Learned images are shown as sigmoid(5 x), once as they are and once less their common mean.
    """
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(9, 9), layout="constrained")
    pixels = [r for r in records if r.metric == "pixel"]
    rows = {}
    for name in dict.fromkeys(r.labels["series"] for r in pixels):
        found = [r.value for r in pixels if r.labels["series"] == name]
        images = np.array(found).reshape(10, 8, 8)
        if name == "class means":
            rows[name] = images
        else:
            rows[name] = _squashed(images)
            rows[f"{name},\nless mean"] = _squashed(images - images.mean(0))
    above, below = figure.subfigures(2, 1, height_ratios=(len(rows) or 1, 3.5))
    if rows:
        grid = above.subplots(len(rows), 10, squeeze=False)
        for line, (name, images) in zip(grid, rows.items(), strict=True):
            for axis, image in zip(line, images, strict=True):
                axis.imshow(image, cmap="gray", vmin=0, vmax=1)
                axis.set(xticks=(), yticks=())
            line[0].set_ylabel(name)
    axis = below.subplots()
    found = [r for r in records if r.metric == "accuracy"]
    for i, name in enumerate(config["solvers"]):
        lines = [r for r in found if r.labels["series"] == name]
        for j, seed in enumerate(dict.fromkeys(r.seed for r in lines)):
            line = [r for r in lines if r.seed == seed]
            places, values = [r.step for r in line], [100 * r.value for r in line]
            label = f"distilled, {name}" if j == 0 else None
            axis.plot(places, values, color=f"C{i}", alpha=0.8, label=label)
    for name, color in REFERENCES.items():
        values = [100 * r.value for r in found if r.labels["series"] == name]
        if values:
            mean = float(np.mean(values))
            axis.axhline(mean, color=color, linestyle="--", label=f"{name} (mean)")
    axis.set(xlabel="outer steps", ylabel="held-out accuracy, trained anew, %")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _squashed(images: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-5 * images))


def show(records: list[Record]) -> None:
    """Prints the final accuracies for each kind of images."""
    for name in dict.fromkeys(r.labels["series"] for r in records):
        for metric in ("accuracy", "accuracy_warm", "over_random", "over_means"):
            found = [r for r in records if r.labels["series"] == name and r.metric == metric]
            values = list({r.seed: r.value for r in found}.values())
            if values:
                n = len(values)
                se = f" ± {np.std(values, ddof=1) / n**0.5:.4f}" if n > 1 else ""
                print(f"{name:>20} {metric:>14}: {np.mean(values):.4f}{se}")


def claims(summary: Summary) -> list[Claim]:
    """Distilled images beat random real images and class means."""
    out = []
    comparisons = {
        "over_random": ("ten random real images", "random images"),
        "over_means": ("the ten class means at their best scale", "class means"),
    }
    for name in SOLVERS:
        ours = summary.find("accuracy", series=name)
        for metric, (says, other) in comparisons.items():
            gain = summary.find(metric, series=f"{name}, gain")
            theirs = summary.find("accuracy", series=other)
            if ours and gain and theirs:
                better = evidence.above(evidence.times(gain, 100), 0.0)
                out.append(
                    Claim(
                        f"ten images distilled with {name} train a better classifier than {says}",
                        "Lorraine et al. 2020 (pictures only: no number of theirs)",
                        f"{points(ours)} against {points(theirs)} %: {better.text} points",
                        better.holds,
                    )
                )
    return out


EXPERIMENT = Experiment(
    name="distillation",
    about="Ten images, learned so that a classifier trained on them knows the digits.",
    settings=Settings,
    scales=SCALES,
    labels=("series", "image"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
