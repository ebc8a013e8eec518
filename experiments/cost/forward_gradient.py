"""``forward_gradient``: one tangent against backpropagation, in seconds (Baydin et al. 2022)."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug
from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.cost import timing
from experiments.problems import data, image_mlp
from unrollgrad.running import need
from unrollgrad.types import GradientEstimator, Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Is a forward gradient twice as fast as backpropagation? MLPs learn digits by both.

    Theta is all weights of an MLP with two hidden layers, and an episode is one step: the loss of a
    batch. Time is the median of runs in turn, each a scan of SGD updates, divided by their number.
    "loss" evaluates the loss alone, and "one tangent" the loss and its derivative along a direction
    that is given; dodge also draws the direction and multiplies it. Then both learn, dodge with
    twice as many updates as bptt, each with the best of its learning rates on another seed.
    """

    widths: tuple[int, ...] = (64, 256, 1024, 4096)
    """Units in each of the two hidden layers of the MLPs that are timed."""
    trained_widths: tuple[int, ...] = (64, 256)
    """Units in each of the two hidden layers of the MLPs that learn."""
    batch_size: int = 64
    """Images in a batch."""
    num_steps: int = 2000
    """Updates of bptt; dodge has twice as many."""
    learning_rates: tuple[float, ...] = (3e-2, 0.1, 0.3, 1.0, 3.0)
    """SGD's rates for bptt."""
    dodge_learning_rates: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """SGD's rates for dodge, whose noise grows with the number of weights."""
    num_repeats: int = 5
    """Runs of each kind."""
    points: int = 20
    """Number of points of each curve."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed is a whole measurement."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        widths=(4, 8),
        trained_widths=(4,),
        batch_size=4,
        num_steps=4,
        learning_rates=(0.1, 0.3),
        dodge_learning_rates=(1e-3, 1e-2),
        num_repeats=1,
        points=2,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", trained_widths=(64, 256, 1024), num_steps=20_000),
}

KINDS = ("loss", "one tangent", "dodge", "bptt")

TUNING = 1000
"""The seed on which the learning rates are chosen."""

SOURCE = "Baydin et al. 2022"


def problem(batch_size: int) -> ug.UnrolledProblem:
    """The loss of an MLP, which is theta, on a batch of digits."""
    images = data.load("digits", None)
    draw = image_mlp.sampler(images.train, batch_size)

    def step(key, theta, state, t):
        return state, image_mlp.cross_entropy(theta, draw(key))

    return ug.UnrolledProblem(lambda key, theta: jnp.zeros(()), step, 1)


def weights(key: Key, width: int) -> Theta:
    """The MLP's first weights: 64 pixels, two hidden layers, 10 classes."""
    return image_mlp.init_params(key, (64, width, width, 10))


def estimators(batch_size: int) -> dict[str, GradientEstimator]:
    """Both estimators; a call is an episode."""
    here = problem(batch_size)
    return {"dodge": ug.dodge(here, truncation=1), "bptt": ug.bptt(here)}


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes seconds per update by width, and the losses along the training."""
    key = jax.random.key(seed)
    for i, width in enumerate(settings.widths):
        progress(f"time, width {width}", 0.7 * i / len(settings.widths))
        programs = {
            kind: functools.partial(f, key, *(weights(k, width) for k in jax.random.split(key)))
            for kind, f in _timed(settings.batch_size, _repeats(width)).items()
        }
        times: dict[str, list[float]] = {kind: [] for kind in programs}
        for _, seconds in timing.in_turn(programs, settings.num_repeats):
            for kind, value in seconds.items():
                times[kind].append(value / _repeats(width))
        for kind, values in times.items():
            over = {f"over_{k}": np.median(np.divide(values, times[k])) for k in ("loss", "bptt")}
            labels = {"part": "time", "width": str(width), "estimator": kind}
            write({**labels, "seconds": np.median(values), **over})
    for i, width in enumerate(settings.trained_widths):
        for j, name in enumerate(("dodge", "bptt")):
            progress(
                f"training, width {width}", 0.7 + 0.15 * (2 * i + j) / len(settings.trained_widths)
            )
            train, rates = _training(settings.without_run(), name), _rates(settings, name)
            rate = _best_rate(settings.without_run(), name, width)
            labels = {"part": "training", "width": str(width), "estimator": name}
            write(
                {**labels, "learning_rate": rate, "at_edge": float(rate in (rates[0], rates[-1]))}
            )
            losses = train(key, weights(jax.random.fold_in(key, width), width), rate)
            every = _updates(settings, name) // settings.points
            for k, loss in enumerate(losses):
                write({**labels, "step": (k + 1) * every, "training_loss": loss})


def _repeats(width: int) -> int:
    """Updates in a timed run: short runs would measure the dispatch."""
    return max(4, 4096 // width)


def _updates(settings: Settings, name: str) -> int:
    return settings.num_steps * (2 if name == "dodge" else 1)


def _rates(settings: Settings, name: str) -> tuple[float, ...]:
    return settings.dodge_learning_rates if name == "dodge" else settings.learning_rates


@functools.lru_cache(maxsize=8)
def _timed(batch_size: int, repeats: int) -> dict[str, Callable[[Key, Theta, Theta], Any]]:
    """For each kind, a compiled run of ``repeats`` updates from weights, with a direction."""
    here = problem(batch_size)

    def loss(key, theta, direction):
        return theta, ug.episode_loss(here, key, theta)

    def one_tangent(key, theta, direction):
        def along(theta):
            return ug.episode_loss(here, key, theta)

        return theta, sum(jax.jvp(along, (theta,), (direction,)))

    def update(estimator):
        def one(key, theta, direction):
            estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
            return _descend(theta, estimate.grad, 1e-6), estimate.loss

        return one

    kinds = {"loss": loss, "one tangent": one_tangent}
    kinds |= {name: update(estimator) for name, estimator in estimators(batch_size).items()}

    def scanned(one):
        @jax.jit
        def run(key, theta, direction):
            def turn(theta, i):
                return one(jax.random.fold_in(key, i), theta, direction)

            return jax.lax.scan(turn, theta, jnp.arange(repeats))

        return run

    return {kind: scanned(kinds[kind]) for kind in KINDS}


def _descend(theta: Theta, grad: Theta, rate: float) -> Theta:
    return jax.tree.map(lambda x, g: x - rate * g, theta, grad)


@functools.lru_cache(maxsize=2)
def _training(settings: Settings, name: str) -> Callable[[Key, Theta, float], jax.Array]:
    """A compiled function: the losses on all training images along one training."""
    estimator, images = estimators(settings.batch_size)[name], data.load("digits", None).train
    whole = jnp.asarray(images.images), jnp.asarray(images.labels)
    every = _updates(settings, name) // settings.points

    @jax.jit
    def train(key, theta, rate):
        def update(theta, i):
            here = jax.random.fold_in(key, i)
            estimate, _ = estimator.estimate(here, theta, estimator.init(here, theta))
            return _descend(theta, estimate.grad, rate), None

        def stretch(theta, i):
            theta, _ = jax.lax.scan(update, theta, i * every + jnp.arange(every))
            return theta, image_mlp.cross_entropy(theta, whole)

        return jax.lax.scan(stretch, theta, jnp.arange(settings.points))[1]

    return train


@functools.lru_cache(maxsize=8)
def _best_rate(settings: Settings, name: str, width: int) -> float:
    """The rate with the lowest loss at the end of the training with the tuning seed."""
    key, train = jax.random.key(TUNING), _training(settings, name)
    rates = _rates(settings, name)
    ends = [float(train(key, weights(key, width), rate)[-1]) for rate in rates]
    return rates[int(np.argmin(np.nan_to_num(ends, nan=np.inf)))]


def _line(
    records: list[Record], part: str, metric: str
) -> dict[tuple[str, int], dict[int, list[float]]]:
    """Values by (estimator, width) and step (0 if there is none), one for each seed."""
    out: dict[tuple[str, int], dict[int, list[float]]] = {}
    for r in records:
        if r.labels["part"] == part and r.metric == metric:
            key = r.labels["estimator"], int(r.labels["width"])
            out.setdefault(key, {}).setdefault(r.step or 0, []).append(r.value)
    return out


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Time over bptt's by width, and the losses against seconds at the widths that learn."""
    trained = [str(w) for w in config["trained_widths"]]
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(4.5 + 3.5 * len(trained), 4), layout="constrained"
    )
    left, *others = figure.subplots(1, 1 + len(trained))
    _draw_times(left, records)
    for axis, width in zip(others, trained, strict=True):
        _draw_training(axis, records, int(width))
    figure.suptitle(f"two hidden layers, {curves.seeds_of(records)}")
    return figure


def _draw_times(axis: Any, records: list[Record]) -> None:
    ratios = _line(records, "time", "over_bptt")
    for kind, (color, marker, dash) in curves.styles(KINDS).items():
        here = {width: line[0] for (name, width), line in ratios.items() if name == kind}
        means = [np.mean(v) for v in here.values()]
        ses = [np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in here.values()]
        look: Any = {"marker": marker, "ls": dash, "color": color, "capsize": 3, "label": kind}
        axis.errorbar(list(here), means, ses, **look)
    axis.axhline(0.5, color="black", ls=":", label="twice as fast as bptt")
    axis.set(xscale="log", xlabel="units per hidden layer", ylabel="time over bptt's")
    curves.from_zero(axis)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def _draw_training(axis: Any, records: list[Record], width: int) -> None:
    seconds, losses = (
        _line(records, "time", "seconds"),
        _line(records, "training", "training_loss"),
    )
    for name, (color, marker, dash) in curves.styles(("dodge", "bptt")).items():
        line = losses.get((name, width), {})
        each = np.mean(seconds[name, width][0]) if (name, width) in seconds else 1.0
        at = each * np.array(list(line))
        table = np.array(list(line.values()))
        mean = table.mean(axis=1)
        axis.plot(at, mean, dash, color=color, marker=marker, markevery=[-1], label=name)
        if table.shape[1] > 1:
            se = table.std(axis=1, ddof=1) / table.shape[1] ** 0.5
            axis.fill_between(at, mean - se, mean + se, color=color, alpha=0.2, lw=0)
    axis.axhline(np.log(10), color="black", ls="--", lw=0.8, label="a guess")
    unit = "seconds" if ("bptt", width) in seconds else "updates"
    axis.set(yscale="log", xlabel=unit, ylabel="training loss", title=f"width {width}, best rates")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)


def show(records: list[Record]) -> None:
    """Prints the times and the losses at the end."""
    seconds, ratios = (_line(records, "time", m) for m in ("seconds", "over_bptt"))
    for (kind, width), line in seconds.items():
        ratio = np.mean(ratios[kind, width][0])
        print(
            f"width {width:5}, {kind:>11}: {1e6 * np.mean(line[0]):9.1f} us, {ratio:.2f} of bptt's"
        )
    for (name, width), line in _line(records, "training", "training_loss").items():
        values = "  ".join(f"{v:.3g}" for v in line[max(line)])
        print(f"width {width:5}, {name}: loss after {max(line)} updates, by seed: {values}")


def claims(summary: Summary) -> list[Claim]:
    """Forward gradients are twice as fast; they learn as much in the same time."""
    config = summary.about["config"]
    ratios = {
        width: summary.find("over_bptt", part="time", width=str(width), estimator="dodge")
        for width in config["widths"]
    }
    out = []
    for bound, what in ((1.0, "less than bptt's time"), (0.5, "at most half of bptt's time")):
        found = {width: evidence.below(ratio, bound) for width, ratio in ratios.items()}
        ours = ", ".join(f"{finding.text} at width {width}" for width, finding in found.items())
        says = f"an update with dodge takes {what}, at every width"
        known = [ratio["mean"] for ratio in ratios.values() if ratio is not None]
        holds = evidence.told(evidence.both(*found.values()), *known)
        out.append(Claim(says, SOURCE, ours, holds))
    for width in config["trained_widths"]:
        labels = {"part": "training", "width": str(width)}
        mine, other = (
            summary.find("training_loss", **labels, estimator=name) for name in ("dodge", "bptt")
        )
        finding = evidence.less(mine, other)
        says = f"width {width}: with twice as many updates dodge's training loss ends below bptt's"
        out.append(Claim(says, SOURCE, finding.text, finding.holds))
    return out


EXPERIMENT = Experiment(
    name="forward_gradient",
    about="Wall-clock of forward gradients (dodge) against backpropagation on MLPs.",
    settings=Settings,
    scales=SCALES,
    labels=("part", "width", "estimator"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On a GPU or a TPU, with networks of 10 million weights or more, updates with dodge "
        "take at most half of bptt's time, or training with them ends lower in equal time, in "
        "five seeds (p < 0.05)."
    ),
)
