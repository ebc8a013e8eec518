"""``overfit_validation``: one decay rate per weight, tuned until 50 images are all correct."""

import dataclasses
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
from unrollgrad.running import need

IMAGES = 50
"""Number of training images, and of validation images."""

FIXED, TUNED = "fixed", "tuned"


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Every weight has its own decay rate, tuned online by identity hypergradients.

    The data are scikit-learn's digits: 50 training and 50 validation images; the other 1697 are the
    test set. The paper uses MNIST and CIFAR-10. The control run keeps the initial decay rates.
    """

    models: tuple[Literal["linear", "mlp"], ...] = ("linear", "mlp")
    """linear: softmax regression. mlp: a network with one hidden layer."""
    hidden: int = 32
    """Number of units in the hidden layer."""
    num_steps: int = 10_000
    """Number of outer steps."""
    inner_steps: int = 5
    """Inner steps per outer step; each uses all training images."""
    inner_learning_rate: float = 1e-3
    """Learning rate of the inner Adam, never reset. Paper: 1e-4, with ten times the steps."""
    learning_rate: float = 1e-2
    """Learning rate of the outer RMSprop."""
    log_decay: float = -4.0
    """Initial value of theta for every weight: the logarithm of its decay rate."""
    points: int = 200
    """Number of points on each curve; it divides the number of outer steps."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws its images and initial weights."""


SCALES = {
    "smoke": Settings(scale="smoke", models=("linear",), num_steps=500, points=20, seeds=(1,)),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=100_000, inner_learning_rate=1e-4),
}


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the accuracies during each run."""
    cells = [(m, d) for m in settings.models for d in (TUNED, FIXED)]
    for i, (model, decay) in enumerate(cells):
        progress(f"{model}, {decay}", i / len(cells))
        result, accuracies = tune(settings, jax.random.key(seed), model, decay == TUNED)
        every = settings.num_steps // settings.points
        size = sum(x.size for x in jax.tree.leaves(result.theta))
        for j, values in enumerate(accuracies):
            numbers = dict(zip(("train", "validation", "test"), map(float, values), strict=True))
            numbers["loss"] = float(result.outer_losses[(j + 1) * every - 1])
            write({"model": model, "decay": decay, "step": (j + 1) * every, **numbers})
        write({"model": model, "decay": decay, "weights": size, **_when(accuracies, every)})


def tune(
    settings: Settings, key: jax.Array, model: str, tuned: bool
) -> "tuple[ug.bilevel.BilevelResult, np.ndarray]":
    """The result, and accuracies of shape (points, 3): training, validation and test."""
    images, labels = map(
        jnp.asarray, need("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    )
    images = (images / 16 - 0.5).astype(jnp.float32)
    key_rows, key_weights = jax.random.split(key)
    order = jax.random.permutation(key_rows, len(images))
    train, validation, test = jnp.split(order, [IMAGES, 2 * IMAGES])

    def cross_entropy(params, rows):
        logits = predict(params, images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    def inner(params, theta):
        decay = jax.tree.map(lambda w, t: jnp.sum(jnp.exp(t) * w**2), params, theta)
        return cross_entropy(params, train) + sum(jax.tree.leaves(decay))

    def outer(params, theta):
        return cross_entropy(params, validation)

    sizes = (64, 10) if model == "linear" else (64, settings.hidden, 10)
    params = _init(key_weights, sizes)
    theta = jax.tree.map(lambda w: jnp.full_like(w, settings.log_decay), params)
    result = ug.bilevel.solve(
        inner,
        ug.implicit.hypergradient(outer, inner, solver=ug.implicit.identity()),
        params,
        theta,
        inner_optimizer=optax.adam(settings.inner_learning_rate),
        inner_steps=settings.inner_steps,
        outer_optimizer=optax.rmsprop(settings.learning_rate) if tuned else optax.set_to_zero(),
        num_steps=settings.num_steps,
        start="warm",
        every=settings.num_steps // settings.points,
    )

    @jax.jit
    @jax.vmap
    def accuracies(params):
        right = jnp.argmax(predict(params, images), axis=-1) == labels
        return jnp.stack([jnp.mean(right[rows]) for rows in (train, validation, test)])

    return result, np.asarray(accuracies(result.paths))


def predict(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The logits of a network with ReLUs between its layers."""
    *before, last = params
    for layer in before:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


def _init(key: jax.Array, sizes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    return [
        {"w": jax.random.normal(k, (a, b)) / jnp.sqrt(a), "b": jnp.zeros(b)}
        for k, a, b in zip(jax.random.split(key, len(sizes)), sizes, sizes[1:], strict=False)
    ]


def _when(accuracies: np.ndarray, every: int) -> dict[str, float]:
    """The first recorded outer step with all validation images correct, if there is one."""
    right = np.flatnonzero(accuracies[:, 1] == 1)
    return {"reached": float((right[0] + 1) * every)} if len(right) else {}


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws accuracies against outer steps, one panel per model: means and all seeds."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(10, 4.8), layout="constrained")
    models = list(dict.fromkeys(r.labels["model"] for r in records))
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    seeds = list(dict.fromkeys(r.seed for r in records))
    for axis, model in zip(axes, models, strict=True):
        for decay, style in {TUNED: "-", FIXED: ":"}.items():
            here = {"model": model, "decay": decay}
            for color, metric in enumerate(("train", "validation", "test")):
                lines = [_line(records, here, metric, seed) for seed in seeds]
                lines = [line for line in lines if line]
                if not lines:
                    continue
                if decay == TUNED:
                    for line in lines:
                        axis.plot(*zip(*line.items(), strict=True), color=f"C{color}", alpha=0.25)
                shared = sorted(set.intersection(*map(set, lines)))
                mean = [sum(line[k] for line in lines) / len(lines) for k in shared]
                name = f"{metric}, decay {decay}"
                axis.plot(shared, mean, style, color=f"C{color}", linewidth=2, label=name)
        axis.set(xscale="log", xlabel="outer steps", title=model)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3)
    return figure


def _line(
    records: list[Record], labels: dict[str, str], metric: str, seed: int
) -> dict[int, float]:
    return {
        r.step: r.value
        for r in records
        if r.metric == metric and r.labels == labels and r.seed == seed and r.step is not None
    }


def show(records: list[Record]) -> None:
    """Prints the final accuracies, averaged over the seeds."""
    seeds = list(dict.fromkeys(r.seed for r in records))
    for model, decay in dict.fromkeys((r.labels["model"], r.labels["decay"]) for r in records):
        cells = []
        for metric in ("train", "validation", "test"):
            here = {"model": model, "decay": decay}
            lines = [line for s in seeds if (line := _line(records, here, metric, s))]
            last = [line[max(line)] for line in lines]
            cells.append(f"{metric} {100 * sum(last) / len(last):.1f} %")
        print(f"{model:>7}, decay {decay}:  {'  '.join(cells)}")


def claims(summary: Summary) -> list[Claim]:
    """Validation accuracy reaches 100 %; test accuracy stays lower."""

    def of(metric, model, decay=TUNED):
        return summary.find(metric, model=model, decay=decay)

    def text(found):
        return evidence.number(found and evidence.times(found, 100)) + " %"

    source = "Lorraine et al. 2020 (there AlexNet on CIFAR-10)"
    out = []
    for model in ("linear", "mlp"):
        validation, test, weights = of("validation", model), of("test", model), of("weights", model)
        fixed, reached = of("validation", model, FIXED), of("reached", model)
        if not (validation and test and weights and fixed):
            continue
        says = f"{model}: a decay rate for each weight fits 50 validation images, 100 %"
        ours = f"{text(validation)} with {evidence.number(weights)} rates "
        ours += f"(with the rates fixed {text(fixed)})"
        if reached:
            ours += f", first after {evidence.number(reached)} outer steps"
            ours += f" ({reached['n']} of {validation['n']} seeds)"
        holds = evidence.told(validation["mean"] == 1, validation["mean"])
        out.append(Claim(says, source, ours, holds))
        far = {**validation, "mean": validation["mean"] - 0.05}
        lower = evidence.less(evidence.times(test, 100), evidence.times(far, 100))
        says = f"{model}: test accuracy stays far lower (by 5 points or more)"
        ours = f"{lower.text}, the validation accuracy less 5 points; with the rates fixed "
        ours += text(of("test", model, FIXED))
        out.append(Claim(says, source, ours, lower.holds))
    return out


EXPERIMENT = Experiment(
    name="overfit_validation",
    about="A decay rate for every weight fits 50 validation images perfectly.",
    settings=Settings,
    scales=SCALES,
    labels=("model", "decay"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
)
