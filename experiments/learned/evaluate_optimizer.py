"""``evaluate_optimizer``: learned optimizers on held-out tasks, beside tuned SGD and Adam."""

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
from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary, summarise
from experiments._framework.settings import CommonSettings
from experiments.learned import tasks
from unrollgrad.learned_optimizers import TRAINED, Architecture
from unrollgrad.running import console, need, positive_int
from unrollgrad.types import Key, Theta

LENGTHS = (1, 2, 5)
"""Lengths of training, in multiples of the horizon of meta-training."""

OVER_BEST = "loss at 1x / that of the best of Adam's rates"
OVER_MEDIAN = "loss at 2x / the median of Adam's rates"

POINTS = 10
"""Points of each training curve per horizon."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """How well do learned optimizers train tasks that they have not seen, and for longer?

    Every seed draws held-out tasks of each family and trains them with every optimizer for 1, 2 and
    5 times the horizon of meta-training. SGD, SGD with momentum 0.9 and Adam try
    `--num-learning-rates` log-spaced constant rates; each is judged by the rate with the lowest
    loss at the horizon on the same tasks. The loss is measured on all training data of a task,
    which neither meta-training nor meta-validation used; a uniform prediction has loss 1.
    """

    files: tuple[Path, ...] = ()
    """Files of learned optimizers. Default: the files in the repository."""
    families: tuple[Literal[tuple(tasks.FAMILIES)], ...] = (  # type: ignore[valid-type]
        "mlp",
        "conv",
        "lstm",
    )
    """Families of tasks."""
    horizon: int | None = None
    """Inner steps for which the optimizers were meta-trained. Default: the files' horizon."""
    num_tasks: int = 8
    """Held-out tasks per family and seed."""
    num_learning_rates: int = 15
    """Learning rates that SGD, momentum and Adam each try."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws its own tasks."""


SCALES = {
    "smoke": Settings(
        scale="smoke", families=("mlp",), num_tasks=2, num_learning_rates=3, seeds=(0, 1)
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_tasks=32),
}


class ByHand(NamedTuple):
    """A hand-designed optimizer whose learning rate is tuned.

    Attributes:
        make: ``make(rate)`` returns the optimizer.
        lowest: The lowest rate.
        highest: The highest rate.
    """

    make: Callable[..., optax.GradientTransformation]
    lowest: float
    highest: float


BY_HAND = {
    "SGD": ByHand(optax.sgd, 1e-3, 10.0),
    "momentum": ByHand(lambda rate: optax.sgd(rate, momentum=0.9), 1e-4, 1.0),
    "Adam": ByHand(optax.adam, 1e-4, 1.0),
}

_HELD_OUT = 2**21  # plus the seed: keys that neither meta-training nor meta-validation uses


def filled(settings: Settings) -> Settings:
    """The settings with the repository's files and their horizon as defaults.

    Raises:
        ValueError: If a number is not positive, there are no files, or files have the same name or
            different horizons.
        FileNotFoundError: If a file does not exist.
    """
    for name in ("num_tasks", "num_learning_rates"):
        positive_int(f"--{name.replace('_', '-')}", getattr(settings, name))
    files = settings.files or tuple(TRAINED.values())
    names = [file.stem for file in files]
    if len(set(names)) < len(names) or not names or any(map(_by_hand, names)):
        raise ValueError(
            f"`--files` must be learned optimizers with different names that do not begin with "
            f"{', '.join(BY_HAND)}; got {names}."
        )
    horizons = {f.stem: ug.learned_optimizers.read(f).notes.get("horizon") for f in files}
    horizon = settings.horizon
    if horizon is None:
        if len(set(horizons.values())) > 1 or None in horizons.values():
            raise ValueError(
                f"the files have different horizons of meta-training, or lack one: {horizons}. "
                "Give --horizon, or test the files one by one."
            )
        (horizon,) = set(horizons.values())
    if horizon is None or horizon < 1 or horizon % POINTS:
        raise ValueError(f"`--horizon` must be a multiple of {POINTS}; got {horizon}.")
    return dataclasses.replace(settings, files=files, horizon=horizon)


def _by_hand(label: str) -> str | None:
    """The hand-designed optimizer that a label belongs to; None for a learned optimizer."""
    return next((name for name in BY_HAND if label.split(" ")[0] == name), None)


def run(settings: Any, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the loss along every optimizer's training, and after 1, 2 and 5 horizons.

    For a learned optimizer it also writes two ratios on the same tasks: its loss over the loss of
    Adam's best rate after one horizon, and over the median of Adam's finite losses after two.
    """
    key = jax.random.key(_HELD_OUT + seed)
    learned = {file.stem: ug.learned_optimizers.read(file) for file in settings.files}
    every = settings.horizon // POINTS
    parts = len(settings.families) * (len(BY_HAND) + len(learned))
    for i, family in enumerate(settings.families):
        adam = np.zeros(0)
        for j, name in enumerate([*BY_HAND, *learned]):
            progress(f"{family}, {name}", (i * (len(BY_HAND) + len(learned)) + j) / parts)
            if name in BY_HAND:
                rates = grid(name, settings.num_learning_rates)
                make, thetas = BY_HAND[name].make, jnp.asarray(rates)
                labels = [f"{name} {rate:.3g}" for rate in rates]
            else:
                make = built(settings.files[j - len(BY_HAND)])
                thetas = jax.tree.map(lambda x: x[None], learned[name].theta)
                labels = [name]
            losses = np.asarray(trained(family, make, key, settings.num_tasks, every, thetas))
            if name == "Adam":
                adam = np.where(np.isfinite(losses), losses, np.inf)
            for label, curve in zip(labels, losses, strict=True):
                series = {"family": family, "optimizer": label}
                for point, loss in enumerate(curve):
                    write({**series, "step": point * every, "loss": loss})
                for length in LENGTHS:
                    step = length * settings.horizon
                    loss = curve[length * POINTS]
                    write({**series, "step": step, f"loss at {length}x": loss})
                if name in learned:
                    # Rates that diverged are left out, since they would raise the median.
                    first, second = adam[:, POINTS], adam[:, 2 * POINTS]
                    best, median = (
                        how(x[np.isfinite(x)]) if np.isfinite(x).any() else np.nan
                        for how, x in ((np.min, first), (np.median, second))
                    )
                    write({**series, OVER_BEST: curve[POINTS] / best})
                    write({**series, OVER_MEDIAN: curve[2 * POINTS] / median})


def grid(name: str, count: int) -> list[float]:
    """The log-spaced learning rates that a hand-designed optimizer tries."""
    return [float(r) for r in np.geomspace(BY_HAND[name].lowest, BY_HAND[name].highest, count)]


@functools.lru_cache(maxsize=64)
def built(file: Path) -> Callable[..., optax.GradientTransformation]:
    """Maps theta to the optimizer; cached, so that it compiles once for all seeds."""
    return ug.learned_optimizers.read(file).build().transform


@functools.partial(jax.jit, static_argnums=(0, 1, 3, 4))
def trained(
    family: str,
    make: Callable[..., optax.GradientTransformation],
    key: Key,
    num_tasks: int,
    every: int,
    thetas: Theta,
) -> jax.Array:
    """Mean losses over held-out tasks, of shape (thetas, points); the first point is step 0."""
    held_out = tasks.FAMILIES[family](part="test")
    problem = tasks.problem(held_out, Architecture(lambda key: None, make), 0)

    def one(theta, key):
        key_init, key_steps = jax.random.split(key)

        def stretch(state, first):
            state, _ = tasks.train(problem, key_steps, theta, state, first, every)
            return state, held_out.whole(state.params, state.task)

        state = problem.init(key_init, theta)
        begin = held_out.whole(state.params, state.task)
        _, losses = jax.lax.scan(stretch, state, every * jnp.arange(POINTS * max(LENGTHS)))
        return jnp.concatenate([begin[None], losses])

    keys = jax.random.split(key, num_tasks)
    every_task = jax.vmap(one, in_axes=(None, 0))
    return jax.lax.map(lambda theta: jnp.mean(every_task(theta, keys), axis=0), thetas)


def _losses(results: list[dict[str, Any]], family: str, name: str, length: int) -> dict[str, float]:
    """Mean losses of one optimizer's rates by label; means that are not finite become inf."""
    return {
        r["optimizer"]: np.inf if r["mean"] is None or not np.isfinite(r["mean"]) else r["mean"]
        for r in results
        if r["family"] == family
        and r["metric"] == f"loss at {length}x"
        and _by_hand(r["optimizer"]) == name
    }


def best_rate(results: list[dict[str, Any]], family: str, name: str) -> str | None:
    """The label of the rate with the lowest loss after one horizon."""
    losses = _losses(results, family, name, 1)
    return min(losses, key=lambda label: losses[label]) if losses else None


def shown(results: list[dict[str, Any]], family: str) -> list[str]:
    """Labels in the table: each hand-designed optimizer at its best rate, then learned ones."""
    names = [r["optimizer"] for r in results if r["family"] == family]
    learned = [n for n in dict.fromkeys(names) if not _by_hand(n)]
    tuned = [best_rate(results, family, name) for name in BY_HAND]
    return [*filter(None, tuned), *learned]


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """A panel per family: losses of the optimizers in the table, and of all of Adam's rates."""
    results = _at_lengths(records)
    families = list(dict.fromkeys(r["family"] for r in results))
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(5 * len(families), 5), layout="constrained"
    )
    axes = figure.subplots(1, len(families), squeeze=False)[0]
    for axis, family in zip(axes, families, strict=True):
        lines: dict[str, dict[int, list[float]]] = {}
        for r in records:
            if r.labels["family"] == family and r.metric == "loss" and r.step is not None:
                points = lines.setdefault(r.labels["optimizer"], {})
                points.setdefault(r.step, []).append(r.value)
        for label, points in lines.items():
            if _by_hand(label) == "Adam":
                axis.plot(list(points), [np.mean(v) for v in points.values()], color="0.85", lw=0.8)
        for i, label in enumerate(shown(results, family)):
            points = lines[label]
            mean = np.array([np.mean(v) for v in points.values()])
            style = "--" if _by_hand(label) else "-"
            axis.plot(list(points), mean, style, color=f"C{i}", label=label)
            counts = [len(v) for v in points.values()]
            if min(counts) > 1:
                se = [np.std(v, ddof=1) / np.sqrt(len(v)) for v in points.values()]
                axis.fill_between(
                    list(points), mean - se, mean + se, color=f"C{i}", alpha=0.2, lw=0
                )
        for length in LENGTHS:
            axis.axvline(length * config["horizon"], color="0.5", lw=0.5)
        low = min(min(map(np.mean, lines[n].values())) for n in shown(results, family))
        axis.set(yscale="log", xlabel="inner steps", title=family, ylim=(0.5 * low, 3))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, title="made by hand: at its best rate")
    axes[0].set_ylabel("training loss, a guess has 1")
    figure.suptitle(
        f"held-out tasks, {curves.seeds_of(records)}; grey: Adam's rates; "
        "lines: 1, 2 and 5 horizons"
    )
    return figure


def show(records: list[Record]) -> None:
    """Prints the table: losses after 1, 2 and 5 horizons, mean ± SE over seeds."""
    results = _at_lengths(records)
    table_of = need("rich.table", "rich").Table
    for family in dict.fromkeys(r["family"] for r in results):
        table = table_of(title=f"{family}: training loss", title_justify="left", box=None)
        table.add_column("optimizer")
        for length in LENGTHS:
            table.add_column(f"{length}x", justify="right")
        for label in shown(results, family):
            table.add_row(label, *(_cell(results, family, label, n) for n in LENGTHS))
        medians = [
            float(np.median(list(_losses(results, family, "Adam", length).values())))
            for length in LENGTHS
        ]
        table.add_row("median of Adam's rates", *(f"{m:.3g}" for m in medians))
        console().print(table)


def _cell(results: list[dict[str, Any]], family: str, label: str, length: int) -> str:
    found = Summary(results, {}).find(f"loss at {length}x", family=family, optimizer=label)
    if found is None or found["mean"] is None or not np.isfinite(found["mean"]):
        return "not finite"
    return curves.text(found["mean"], found["se"] or 0.0)


def _at_lengths(records: list[Record]) -> list[dict[str, Any]]:
    """Means over seeds after 1, 2 and 5 horizons."""
    return summarise([r for r in records if r.metric.startswith("loss at")])


def claims(summary: Summary) -> list[Claim]:
    """Every learned optimizer beats Adam's best rate, in every family."""
    out = []
    for family in dict.fromkeys(r["family"] for r in summary.results):
        for name in dict.fromkeys(r["optimizer"] for r in summary.results):
            found = [
                summary.find(m, family=family, optimizer=name) for m in (OVER_BEST, OVER_MEDIAN)
            ]
            if None in found:
                continue
            findings = [evidence.below(f, 1.0) for f in found]
            out.append(
                Claim(
                    f"{family}, {name}: training loss at the horizon below that of the best of "
                    "Adam's rates, at twice the horizon below their median",
                    "our own, after Metz et al. 2019",
                    f"{findings[0].text} and {findings[1].text} times as much",
                    evidence.both(*findings),
                )
            )
    return out


EXPERIMENT = Experiment(
    name="evaluate_optimizer",
    about="Learned optimizers on held-out tasks and longer runs, against tuned SGD and Adam.",
    settings=Settings,
    scales=SCALES,
    labels=("family", "optimizer"),
    fill=filled,
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On larger test tasks (a ResNet, 10,000 steps), the comparison with the best of Adam's "
        "rates, chosen on other seeds, comes out the other way in 20 seeds (p < 0.05)."
    ),
)
