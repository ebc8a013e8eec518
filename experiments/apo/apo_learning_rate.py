"""``apo_learning_rate``: learning rates found during training, from three initial values."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

from experiments._framework import evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.apo import rivals
from experiments.apo.proximal_training import Task, last_tenth, train, worst
from experiments.problems.digits import MLP
from unrollgrad import apo
from unrollgrad.running import need

APO, FIXED, DECAY, COSINE = "APO", "fixed", "step decay", "cosine decay"
OSGM, SCHEDULE_FREE = "OSGM", "schedule-free AdamW"

BASES = {
    "SGD": optax.sgd,
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "RMSprop": lambda rate: optax.rmsprop(rate, decay=0.99),
    "Adam": optax.adam,
}

GRIDS = {
    "SGD": (1e-2, 10**0.5),
    "momentum": (1e-3, 10**-0.5),
    "RMSprop": (1e-4, 10**-1.5),
    "Adam": (1e-4, 10**-1.5),
}
"""Lowest and highest of the nine rates that are tried, spaced geometrically."""

BEGINNINGS = {
    "SGD": (1e-4, 1e-2, 1.0),
    "momentum": (1e-5, 1e-3, 1e-1),
    "RMSprop": (1e-6, 1e-4, 1e-2),
    "Adam": (1e-6, 1e-4, 1e-2),
}
"""Initial rates of APO."""

RIVALS = {"SGD": OSGM, "Adam": SCHEDULE_FREE}
"""A method that needs no schedule, drawn beside the optimizer that it is most like."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Amortized proximal optimization (APO) adapts learning rates on scikit-learn's digits.

    APO starts from three initial rates, each a factor of 100 above the last. It is compared with
    the best fixed rate, with a step decay (by 10 after half of the steps and by 100 after three
    quarters), with a cosine decay, with OSGM and with schedule-free AdamW. Everything is tuned with
    the same care on seeds of its own: nine rates, or nine pairs of lambdas from APO's middle
    beginning. Every batch draws wrong labels with some probability, so the lowest possible loss is
    the labels' entropy, not zero: what is reported is the excess over it, on all images, in
    expectation over the wrong labels.
    """

    nets: tuple[Literal["MLP", "conv net"], ...] = ("MLP",)
    """MLP: 32 hidden units. conv net: two convolutions with 8 and 16 channels."""
    bases: tuple[Literal["SGD", "momentum", "RMSprop", "Adam"], ...] = (
        "SGD",
        "momentum",
        "RMSprop",
        "Adam",
    )
    """Optimizers whose learning rate is adapted."""
    lambda_fsd: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Weights, to choose from, of the KL divergence of the predictions before and after a step."""
    lambda_wsd: tuple[float, ...] = (0.1, 1.0, 3.0)
    """Weights, to choose from, of half the squared distance that a step moves the weights."""
    meta_learning_rate: float = 0.1
    """Learning rate of the meta-optimizer, RMSprop."""
    meta_interval: int = 10
    """Number of training steps per meta-step."""
    wrong_labels: float = 0.1
    """Probability that a label is replaced by a uniform draw from all ten classes."""
    batch_size: int = 64
    """Number of images per batch."""
    num_steps: int = 10_000
    """Number of training steps."""
    points: int = 50
    """Number of points on each curve; it divides the number of steps."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws its initial weights and its batches."""
    tuning_seeds: tuple[int, ...] = (100, 101)
    """Rates and lambdas have the lowest mean loss over these seeds, which are not reported."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        bases=("SGD",),
        lambda_fsd=(3.0,),
        lambda_wsd=(0.1, 1.0),
        num_steps=500,
        points=20,
        seeds=(0,),
        tuning_seeds=(100,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_steps=50_000, seeds=tuple(range(10))),
}


class ConvNet(nnx.Module):
    """Two convolutions with stride 2 and a linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 8, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        """The logits of a batch of images with 64 pixels each."""
        x = nnx.relu(self.first(x.reshape(-1, 8, 8, 1)))
        x = nnx.relu(self.second(x))
        return self.out(x.reshape(len(x), -1))


def task(net: str, batch: int, wrong: float) -> Task:
    """The training task: classification of all 1797 digits, with some wrong labels."""

    def build(key):
        rngs = nnx.Rngs(key)
        return MLP(64, 32, 10, rngs=rngs) if net == "MLP" else ConvNet(rngs)

    images, labels = need("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    images, labels = jnp.asarray(images, jnp.float32) / 16 - 0.5, jnp.asarray(labels)
    clean = jax.nn.one_hot(labels, 10)
    graph = nnx.graphdef(build(0))

    def sample(key):
        rows, which, other = jax.random.split(key, 3)
        rows = jax.random.randint(rows, (batch,), 0, len(images))
        drawn = jax.nn.one_hot(jax.random.randint(other, (batch,), 0, 10), 10)
        flip = jax.random.bernoulli(which, wrong, (batch, 1))
        return images[rows], jnp.where(flip, drawn, clean[rows])

    def predict(params, batch):
        return nnx.merge(graph, params)(batch[0])

    def loss(params, batch):
        return optax.softmax_cross_entropy(predict(params, batch), batch[1]).mean()

    whole = images, (1 - wrong) * clean + wrong / 10
    return Task(
        init=lambda key: nnx.state(build(key), nnx.Param),
        sample=sample,
        predict=predict,
        loss=loss,
        evaluate=lambda params: loss(params, whole),
    )


def floor(wrong: float) -> float:
    """The entropy of a label, in nats: the lowest possible expected loss."""
    right, other = 1 - wrong + wrong / 10, wrong / 10
    return -(right * np.log(right) + 9 * other * np.log(other)) if wrong else 0.0


def methods(base: str) -> tuple[str, ...]:
    """The methods that are compared for one base optimizer."""
    return (APO, FIXED, DECAY, COSINE, *([RIVALS[base]] if base in RIVALS else []))


def candidates(settings: Settings, base: str, method: str) -> list[tuple[float, ...]]:
    """The numbers among which a method's are chosen; APO's first one is its beginning."""
    if method == APO:
        lambdas = itertools.product(settings.lambda_fsd, settings.lambda_wsd)
        return [(BEGINNINGS[base][1], *pair) for pair in lambdas]
    if method == OSGM:  # the first scale, and the step size of the scales
        return list(itertools.product((0.01, 0.1, 1.0), (1e-3, 1e-2, 1e-1)))
    grid = GRIDS["Adam"] if method == SCHEDULE_FREE else GRIDS[base]
    return [(float(rate),) for rate in np.geomspace(*grid, 9)]


def optimizer(settings: Settings, base: str, method: str, x: jax.Array) -> Any:
    """The optimizer of a method with these numbers, and how it gives the weights to report."""
    steps, make = settings.num_steps, BASES[base]
    if method == FIXED:
        return make(x[0])
    if method == DECAY:
        drops = {steps // 2: 0.1, 3 * steps // 4: 0.1}
        return make(optax.piecewise_constant_schedule(x[0], drops))
    if method == COSINE:
        return make(lambda t: x[0] * (1 + jnp.cos(jnp.pi * jnp.minimum(t / steps, 1))) / 2)
    if method == OSGM:
        return rivals.osgm(x[0], x[1])
    if method == SCHEDULE_FREE:
        return contrib.schedule_free_adamw(x[0], warmup_steps=steps // 20)
    return apo.learning_rate(
        make,
        x[0],
        lambda_fsd=x[1],
        lambda_wsd=x[2],
        meta_optimizer=optax.rmsprop(settings.meta_learning_rate, eps=1e-30, bias_correction=True),
        meta_interval=settings.meta_interval,
    )


@functools.cache
def _program(
    settings: Settings, net: str, base: str, method: str
) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """One run from a key, with a method's numbers: losses and learning rates."""
    here = task(net, settings.batch_size, settings.wrong_labels)
    averages = method == SCHEDULE_FREE
    reported = contrib.schedule_free_eval_params if averages else lambda state, params: params

    @jax.jit
    def one(key, x):
        made = optimizer(settings, base, method, x)
        return train(here, made, key, settings.num_steps, settings.points, reported)[1:]

    return one


def _curves(
    settings: Settings, seed: int, cell: tuple[str, str, str], numbers: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """The excess over the floor, and the learning rates, during training."""
    program = _program(settings, *cell)
    losses, found = program(jax.random.key(seed), jnp.asarray(numbers, jnp.float32))
    return np.asarray(losses) - floor(settings.wrong_labels), np.asarray(found)


@functools.cache
def tuned(settings: Settings, cell: tuple[str, str, str]) -> tuple[float, ...]:
    """The candidate with the lowest mean final excess over the seeds for tuning."""

    def score(numbers):
        ends = [last_tenth(_curves(settings, s, cell, numbers)[0]) for s in settings.tuning_seeds]
        return float(np.nan_to_num(np.mean(ends), nan=np.inf))

    found = candidates(settings, *cell[1:])
    return min(found, key=score) if len(found) > 1 else found[0]


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes each method's curve with its tuned numbers, and its final excess."""
    setting = settings.without_run()  # the cache key of programs and choices
    cells = [
        (net, base, method)
        for net in settings.nets
        for base in settings.bases
        for method in methods(base)
    ]
    every = settings.num_steps // settings.points
    for i, cell in enumerate(cells):
        progress(", ".join(cell), i / len(cells))
        chosen = tuned(setting, cell)
        ours = cell[2] == APO
        for first in BEGINNINGS[cell[1]] if ours else chosen[:1]:
            losses, found = _curves(setting, seed, cell, (first, *chosen[1:]))
            named = (first,) if ours else chosen
            labels = dict(zip(("net", "base", "method"), cell, strict=True))
            labels["rate"] = ", ".join(f"{x:.3g}" for x in named)
            for j, (loss, rate) in enumerate(zip(losses, found, strict=True)):
                numbers = {"learning_rate": float(rate)} if ours else {}
                write({**labels, "step": (j + 1) * every, "loss": float(loss), **numbers})
            numbers = {"lambda_fsd": chosen[1], "lambda_wsd": chosen[2]} if ours else {}
            write({**labels, "excess": float(last_tenth(losses)), **numbers})


def _series(records: list[Record], metric: str, **labels: str) -> dict[str, dict[int, np.ndarray]]:
    """The values in order of steps, by rate and then by seed."""
    out: dict[str, dict[int, list[float]]] = {}
    for r in records:
        if r.metric == metric and all(r.labels[k] == v for k, v in labels.items()):
            out.setdefault(r.labels["rate"], {}).setdefault(r.seed, []).append(r.value)
    return {rate: {s: np.array(v) for s, v in line.items()} for rate, line in out.items()}


def finals(records: list[Record], net: str, base: str, method: str) -> dict[str, float]:
    """The final excess, averaged over seeds, by rate."""
    found = _series(records, "excess", net=net, base=base, method=method)
    return {rate: float(np.mean(list(line.values()))) for rate, line in found.items()}


STYLES = {FIXED: ("k", ":"), DECAY: ("k", "--"), COSINE: ("0.5", "-.")}
STYLES |= {OSGM: ("C3", "-"), SCHEDULE_FREE: ("C4", "-")}


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws losses (top) and rates (bottom), one column for each network and base optimizer."""
    cells = list(dict.fromkeys((r.labels["net"], r.labels["base"]) for r in records))
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(3.2 * max(2, len(cells)), 6.8), layout="constrained"
    )
    axes = figure.subplots(2, len(cells), squeeze=False, sharex=True)
    every = config["num_steps"] // config["points"]
    steps = every * np.arange(1, config["points"] + 1)
    for (upper, lower), (net, base) in zip(axes.T, cells, strict=True):
        where = {"net": net, "base": base}
        names = "lowest", "middle", "highest"
        for i, (rate, line) in enumerate(_series(records, "loss", **where, method=APO).items()):
            _band(upper, steps, line, f"APO, {names[i % 3]} beginning", color=f"C{i}")
            _band(lower, steps, _series(records, "learning_rate", **where, method=APO)[rate],
                  None, color=f"C{i}")  # fmt: skip
        for method, (color, style) in STYLES.items():
            for rate, line in _series(records, "loss", **where, method=method).items():
                _band(upper, steps, line, method, color=color, linestyle=style)
                if method == FIXED:
                    lower.axhline(float(rate), color=color, linestyle=style)
        upper.set(title=f"{net}, {base}", yscale="log")
        lower.set(yscale="log", xscale="log", xlabel="steps")
        for axis in (upper, lower):
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("excess of the loss over its floor, nats")
    axes[1, 0].set_ylabel("learning rate")
    drawn = {}
    for axis in axes[0]:
        for line, name in zip(*axis.get_legend_handles_labels(), strict=True):
            drawn.setdefault(name, line)
    figure.legend(
        drawn.values(),
        drawn.keys(),
        loc="outside lower center",
        ncols=min(4, len(cells) + 1),
        fontsize="small",
    )
    return figure


def _band(axis: Any, steps: np.ndarray, runs: dict[int, np.ndarray], name: str | None, **style):
    """The mean over the seeds, in a band of one standard error."""
    length = min(map(len, runs.values()))  # an interrupted run has fewer
    values = np.array([y[:length] for y in runs.values()])
    mean, at = values.mean(0), steps[-length:]
    axis.plot(at, mean, label=name, **style)
    if len(values) > 1:
        se = values.std(0, ddof=1) / np.sqrt(len(values))
        axis.fill_between(at, mean - se, mean + se, color=style["color"], alpha=0.2, lw=0)


def show(records: list[Record]) -> None:
    """Prints the final excess of every method, averaged over the seeds."""
    for net, base in dict.fromkeys((r.labels["net"], r.labels["base"]) for r in records):
        for method in methods(base):
            found = finals(records, net, base, method)
            text = ", ".join(f"{rate}: {value:.4f}" for rate, value in found.items())
            print(f"{net:>8}, {base:>8}, {method:>19}  {text}")


def claims(summary: Summary) -> list[Claim]:
    """APO against what it is said to replace, by the excess over the floor."""
    cells = dict.fromkeys((r["net"], r["base"]) for r in summary.results)
    return [claim for cell in cells for claim in _claims_of(summary, *cell)]


def _claims_of(summary: Summary, net: str, base: str) -> list[Claim]:
    found: dict[str, list[dict[str, Any]]] = {}
    for r in summary.results:
        if r["metric"] == "excess" and (r["net"], r["base"]) == (net, base):
            found.setdefault(r["method"], []).append(r)
    ours, paper = found.get(APO), "Bae et al. 2022 (there ResNets on CIFAR)"
    if not ours:
        return []  # an interrupted run
    highest = worst(ours)
    lowest = min(ours, key=lambda r: r["mean"] if math.isfinite(r["mean"]) else math.inf)

    def claim(says, source, other, factor=1.0):
        test = evidence.less(highest, other, factor)
        share = highest["mean"] / other["mean"] - 1 if other else math.nan
        text = f"excess {test.text}" + (f": {100 * share:+.0f} %" if math.isfinite(share) else "")
        return Claim(f"{net}, {base}: {says}", source, text, test.holds)

    def rival(method):
        return found[method][0] if method in found else None

    out = [
        claim("from rates four decades apart the excess ends within 10 %", paper, lowest, 1.1),
        claim("APO ends below the best fixed rate", paper, rival(FIXED)),
        claim("APO ends at most 10 % above the best fixed rate", "our target", rival(FIXED), 1.1),
        claim("APO ends at most 10 % above the best step decay", paper, rival(DECAY), 1.1),
        claim("APO ends below the best cosine decay", "our target", rival(COSINE)),
    ]
    if base in RIVALS:
        out.append(claim(f"APO ends below {RIVALS[base]}", "our target", rival(RIVALS[base])))
    return out


EXPERIMENT = Experiment(
    name="apo_learning_rate",
    about="Learning rates that APO finds while training, from three beginnings.",
    settings=Settings,
    scales=SCALES,
    labels=("net", "base", "method", "rate"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a ResNet and CIFAR, with lambdas chosen on other seeds, the comparison of APO's "
        "excess loss with that of the best fixed rate comes out the other way in ten seeds (p "
        "< 0.05)."
    ),
)
