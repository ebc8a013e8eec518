"""``low_rank_training``: training with noise of rank one against dense noise."""

import dataclasses
import functools
import time
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
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.problems import copy_task, learned_optimizer
from unrollgrad.running import need
from unrollgrad.types import Key, Theta


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Does noise of rank one train as well as dense noise, and is it faster?

    Staggered workers of es_single train all weights of a network by Adam: "optimizer" is a learned
    optimizer (an MLP that computes the updates of another one on digits), "lstm" an LSTM on the
    copy task. Both laws have the same pairs, and each the best of its learning rates on another
    seed. The loss is J on fresh episodes. Seconds count updates alone; the laws take turns. "At
    equal seconds" compares the losses when the faster law's run ends.
    """

    problems: tuple[Literal["optimizer", "lstm"], ...] = ("optimizer", "lstm")
    """What is trained."""
    hidden: int = 32
    """Hidden units of the learned optimizer, and units of the LSTM."""
    horizon: int = 16
    """Inner steps of an episode."""
    num_workers: int = 4
    """Workers, each with its own episode; a divisor or a multiple of the windows of an episode."""
    num_windows: int = 4
    """Windows of an episode."""
    num_pairs: int = 8
    """Antithetic pairs of a worker."""
    num_steps: int = 400
    """Updates of theta."""
    learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Adam's learning rates."""
    points: int = 10
    """Points of each curve after the first."""
    num_episodes: int = 128
    """Fresh episodes that measure J."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        problems=("lstm",),
        hidden=6,
        horizon=4,
        num_workers=2,
        num_windows=2,
        num_pairs=2,
        num_steps=4,
        learning_rates=(0.01, 0.03),
        points=2,
        num_episodes=4,
        seeds=(0,),
    ),
    "cpu": Settings(),
    "paper": Settings(
        scale="paper",
        hidden=256,
        horizon=100,
        num_workers=64,
        num_pairs=128,
        num_steps=20_000,
        learning_rates=(0.0003, 0.001, 0.003, 0.01, 0.03),
        points=50,
        num_episodes=1024,
    ),
}

LAWS = {"dense": ug.noise.gaussian(), "rank one": ug.noise.low_rank()}

SIGMA = {"optimizer": 0.02, "lstm": 0.1}

TUNING = 1_000_000
"""The seed with which the learning rates are chosen."""

SOURCE = "Sarkar et al. 2025, on large networks"


class _Training(NamedTuple):
    """The compiled parts of a training.

    Attributes:
        begin: ``begin(key, rate)`` is the carry before the first update.
        advance: ``advance(carry, key, rate, first)`` makes the updates up to the next point.
        loss: ``loss(theta)`` is J.
    """

    begin: Callable[..., Any]
    advance: Callable[..., Any]
    loss: Callable[..., Any]


class _Line(NamedTuple):
    """A run's losses and seconds at its points, from the beginning on."""

    losses: list[float]
    seconds: list[float]


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the curves of both laws, and their losses when the faster law's run ends."""
    plain, names = settings.without_run(), settings.problems
    for i, problem in enumerate(names):
        progress(f"{problem}: learning rates", i / len(names))
        rates = {law: best_rate(plain, problem, law) for law in LAWS}
        lines = _lines(plain, problem, rates, jax.random.key(seed))
        every = settings.num_steps // settings.points
        budget = min(line.seconds[-1] for line in lines.values())
        for law, line in lines.items():
            labels = {"problem": problem, "estimator": law}
            at_budget = float(np.interp(budget, line.seconds, line.losses))
            edges = settings.learning_rates[0], settings.learning_rates[-1]
            write(
                {
                    **labels,
                    "loss_at_equal_seconds": at_budget,
                    "seconds_per_update": line.seconds[-1] / settings.num_steps,
                    "learning_rate": rates[law],
                    "at_edge": float(rates[law] in edges),
                }
            )
            for k, (loss, seconds) in enumerate(zip(*line, strict=True)):
                write({**labels, "step": k * every, "loss": loss, "seconds": seconds})


def _lines(settings: Settings, problem: str, rates: dict[str, float], key: Key) -> dict[str, _Line]:
    """The curves of these laws; they take turns, so that the machine's pace is the same."""
    parts = {law: _training(settings, problem, law) for law in rates}
    carries = {law: part.begin(key, rates[law]) for law, part in parts.items()}
    lines = {law: _Line([float(parts[law].loss(carries[law][0]))], [0.0]) for law in rates}
    every = settings.num_steps // settings.points
    for point in range(settings.points):
        for law in list(rates)[:: 1 if point % 2 else -1]:
            begun = time.perf_counter()
            carry = parts[law].advance(carries[law], key, rates[law], point * every)
            carries[law] = jax.block_until_ready(carry)
            line = lines[law]
            line.seconds.append(line.seconds[-1] + time.perf_counter() - begun)
            line.losses.append(float(parts[law].loss(carry[0])))
    return lines


@functools.lru_cache(maxsize=8)
def best_rate(settings: Settings, problem: str, law: str) -> float:
    """The rate with the lowest geometric mean of J along a run with the tuning seed."""
    scores = []
    for rate in settings.learning_rates:
        line = _lines(settings, problem, {law: rate}, jax.random.key(TUNING))[law]
        score = float(np.mean(np.log(line.losses[1:])))
        scores.append(score if np.isfinite(score) else np.inf)
    return settings.learning_rates[int(np.argmin(scores))]


@functools.lru_cache(maxsize=8)
def _training(settings: Settings, name: str, law: str) -> _Training:
    problem, first = _problem(settings, name)
    truncation = settings.horizon // settings.num_windows
    sigma, pairs = SIGMA[name], settings.num_pairs
    es = ug.es_single(problem, truncation=truncation, sigma=sigma, num_pairs=pairs, noise=LAWS[law])
    workers = ug.average(es, settings.num_workers, stagger="breakstep")
    every = settings.num_steps // settings.points

    def begin(key, rate):
        theta = jax.tree.map(jnp.asarray, first)
        return theta, workers.init(key, theta), optax.adam(rate).init(theta)

    def advance(carry, key, rate, first):
        def update(carry, i):
            theta, state, opt_state = carry
            estimate, state = workers.estimate(jax.random.fold_in(key, i), theta, state)
            change, opt_state = optax.adam(rate).update(estimate.grad, opt_state, theta)
            return (optax.apply_updates(theta, change), state, opt_state), None

        return jax.lax.scan(update, carry, first + jnp.arange(every))[0]

    def loss(theta):
        keys = jax.random.split(jax.random.key(TUNING + 1), settings.num_episodes)
        return jnp.mean(
            jax.lax.map(lambda k: ug.episode_loss(problem, k, theta), keys, batch_size=32)
        )

    key, rate = jax.random.key(0), settings.learning_rates[0]
    # Compiled here: the first stretch of a run is timed, too.
    carry = jax.eval_shape(begin, key, rate)
    compiled = jax.jit(advance).lower(carry, key, rate, 0).compile()
    return _Training(jax.jit(begin), compiled, jax.jit(loss))


def _problem(settings: Settings, name: str) -> tuple[ug.UnrolledProblem, Theta]:
    if name == "lstm":
        return copy_task.copy_task(settings.horizon, hidden=settings.hidden, batch_size=8)[:2]
    return learned_optimizer.learned_optimizer(settings.horizon, width=settings.hidden, hidden=8)[
        :2
    ]


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """For each problem the loss against updates, and against seconds."""
    problems = config["problems"]
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(9, 0.6 + 3.4 * len(problems)), layout="constrained"
    )
    rows = figure.subplots(len(problems), 2, squeeze=False, sharey="row")
    for row, problem in zip(rows, problems, strict=True):
        here = [r for r in records if r.labels["problem"] == problem]
        curves.plot(row[0], here, "loss")
        row[0].set(ylabel="J", title=f"{problem}: at equal pairs")
        _draw_seconds(row[1], here)
        row[1].set(title=f"{problem}: at equal seconds")
    rows[0][0].legend(title=curves.seeds_of(records), fontsize=8)
    pairs = config["num_workers"] * config["num_pairs"]
    figure.suptitle(f"{pairs} pairs, {config['hidden']} hidden units")
    return figure


def _draw_seconds(axis: Any, records: list[Record]) -> None:
    """The mean loss against the mean seconds of every law."""
    losses, seconds = (curves.curves(records, metric) for metric in ("loss", "seconds"))
    for (law, runs), style in zip(losses.items(), curves.styles(losses).values(), strict=True):
        length = min(len(y) for _, y in runs.values())
        values = np.array([y[:length] for _, y in runs.values()])
        at = np.mean([y[:length] for _, y in seconds[law].values()], axis=0)
        mean, look = values.mean(axis=0), {"marker": style.marker, "markevery": [-1]}
        axis.plot(at, mean, style.dash, color=style.color, label=law, **look)
        if len(values) > 1:
            se = values.std(axis=0, ddof=1) / len(values) ** 0.5
            axis.fill_between(at, mean - se, mean + se, color=style.color, alpha=0.2, lw=0)
    axis.set(xlabel="seconds")
    axis.grid(alpha=0.3)


METRICS = ("loss", "loss_at_equal_seconds", "seconds_per_update", "learning_rate")


def show(records: list[Record]) -> None:
    """Prints the losses at the end, at equal seconds, and the time of an update."""
    for problem in dict.fromkeys(r.labels["problem"] for r in records):
        here = [r for r in records if r.labels["problem"] == problem]
        for metric in METRICS:
            for law, values in curves.last(here, metric).items():
                each = "  ".join(f"{v:.3g}" for v in values)
                print(f"{problem:>10}  {law:>9}  {metric}, by seed: {each}")


def claims(summary: Summary) -> list[Claim]:
    """Rank one learns the same from as many pairs, in less time."""
    out = []
    for problem in summary.about["config"]["problems"]:
        thin, dense = (
            {m: summary.find(m, problem=problem, estimator=law) for m in METRICS}
            for law in ("rank one", "dense")
        )
        losses = evidence.ratio(thin["loss"], dense["loss"])
        finding = evidence.agrees(losses, 0.9, 1.1, blind=0.1)
        says = f"{problem}: at equal pairs J with rank one is within a tenth of J with dense noise"
        out.append(Claim(says, SOURCE, f"ratio {finding.text}", finding.holds))
        for metric, what in (
            ("seconds_per_update", "an update takes less time with rank one"),
            ("loss_at_equal_seconds", "at equal seconds J is lower with rank one"),
        ):
            finding = evidence.less(thin[metric], dense[metric])
            out.append(Claim(f"{problem}: {what}", SOURCE, finding.text, finding.holds))
    return out


EXPERIMENT = Experiment(
    name="low_rank_training",
    about="Training a learned optimizer and an LSTM with rank-one noise and with dense noise.",
    settings=Settings,
    scales=SCALES,
    labels=("problem", "estimator"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "With 256 hidden units and 8192 pairs on a GPU, J with rank-one noise ends over 10 % above "
        "J with dense noise after as many updates, in five seeds (p < 0.05)."
    ),
)
