"""``stn_schedules``: the schedule of an LSTM's dropout that a self-tuning network finds."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.stn import language
from experiments.stn.language import DROP
from experiments.stn.training import CALL, Tuner, Tuning, lowest, plain, self_tuning
from unrollgrad.running import need

TUNED, REPLAY, LAST = "delta_stn", "schedule replayed", "its last value"
SHUFFLED, FIXED, PERTURBED = "schedule shuffled", "best fixed", "best fixed, perturbed"
METHODS = (TUNED, REPLAY, LAST, SHUFFLED, FIXED, PERTURBED)
GRID = "grid"
GAPS = ("above replayed", "above replayed in test", "above replayed along the way")
"""How far a method's losses are above those of the replayed schedule: the lowest validation loss,
the test loss of the same weights, and the lowest validation loss so far, averaged over the run."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """A character-level LSTM with dropout of its outputs, which delta_stn tunes while it trains.

    Fresh trainings then replay the schedule of rates, keep its last value, or use its values in a
    random order. Beside them: the best fixed rate of a grid, and this rate with Gaussian noise. The
    paper has words of the Penn Treebank and an LSTM of 650 units; here are characters of the
    standard library's source.
    """

    hidden: int = 40
    """Units of the LSTM."""
    embed: int = 16
    """Size of the embedding."""
    window: int = 16
    """Characters in a window."""
    batch_size: int = 16
    """Windows in a batch."""
    train: int = 8000
    """Characters of the training text; few, so that regularisation matters."""
    num_steps: int = 2000
    """Training steps."""
    inner_learning_rate: float = 3e-3
    """Learning rate of the weights' Adam."""
    response_rate: float = 3e-3
    """Learning rate of the response's Adam."""
    learning_rate: float = 0.04
    """Learning rate of theta's RMSprop. This and the response's rate were set on seed 100."""
    sigma: float = 0.5
    """First standard deviation of the perturbations."""
    num_perturbations: int = 4
    """Perturbations of the rate in a batch."""
    warm_up: int = 20
    """Calls, of five training steps each, before the rate moves."""
    noise: float = 0.05
    """Standard deviation of the noise of the perturbed rate, as in the paper."""
    every: int = 100
    """Training steps between the points at which the losses are measured."""
    retrainings: int = 2
    """Fresh trainings of each kind; their mean counts."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seed draws weights and batches."""


SCALES = {
    "smoke": Settings(
        scale="smoke", hidden=8, train=2000, num_steps=200, warm_up=5, retrainings=1, seeds=(0,)
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", hidden=256, window=64, train=30_000, num_steps=50_000),
}


def fill(settings: Settings) -> Settings:
    """Checks the settings and returns them unchanged.

    Raises:
        ValueError: If numbers of steps are not multiples of each other.
    """
    if settings.every % CALL or settings.num_steps % settings.every:
        raise ValueError(
            f"`every`={settings.every} must be a multiple of {CALL} that divides "
            f"num_steps={settings.num_steps}."
        )
    return settings


def sizes(settings: Settings) -> language.Sizes:
    """The sizes of the network and of the text."""
    return language.Sizes(
        settings.hidden, settings.embed, settings.window, settings.batch_size, settings.train
    )


@functools.cache
def programs(settings: Settings) -> tuple[Any, Any]:
    """The training that is tuned, and the plain one; all seeds share the compiled programs."""
    build = functools.partial(language.task, sizes(settings), settings.inner_learning_rate)
    options = settings.num_perturbations, settings.warm_up, settings.every
    return self_tuning(Tuner(build, "delta_stn", *options)), plain(build, settings.every)


def run(settings: Settings, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes the lowest losses so far of every method, and the rates that they use."""
    setting, rng = settings.without_run(), np.random.default_rng(seed)
    here, key = language.data(sizes(setting)), jax.random.key(seed)
    tuned, train = programs(setting)
    total = 1 + len(language.RANGE.grid) + 5 * settings.retrainings
    done = 0

    def advance(text: str) -> None:
        nonlocal done
        progress(text, done / total)
        done += 1

    def curve(method: str, losses: np.ndarray, rates: np.ndarray | float) -> None:
        rates = np.broadcast_to(rates, (settings.num_steps // CALL,))
        for i, (validation, test) in enumerate(losses):
            step = (i + 1) * settings.every
            numbers = {"validation": float(validation), "test": float(test)}
            rate = float(rates[step // CALL - 1])
            write({"method": method, "rate": "", "step": step, "dropout": rate, **numbers})

    advance(TUNED)
    tuning = Tuning(settings.learning_rate, settings.response_rate, settings.sigma)
    found = tuned(here, key, tuning, settings.num_steps)
    schedule = np.asarray(found.schedule.values[DROP])
    ends = {TUNED: lowest(found.losses)}
    curve(TUNED, ends[TUNED], schedule)
    grid = {}
    for rate in language.RANGE.grid:
        advance(f"{GRID}, {rate:g}")
        losses = lowest(train(here, jax.random.fold_in(key, 1), {DROP: rate}, settings.num_steps))
        grid[rate] = losses[-1, 0]
        numbers = {"validation": float(losses[-1, 0]), "test": float(losses[-1, 1])}
        write({"method": GRID, "rate": f"{rate:g}", **numbers})
    best = min(grid, key=lambda rate: grid[rate])
    for method, rates in used(settings, schedule, best, rng).items():
        runs = []
        for k in jax.random.split(jax.random.fold_in(key, 2), settings.retrainings):
            advance(method)
            runs.append(lowest(train(here, k, {DROP: rates}, settings.num_steps)))
        ends[method] = np.mean(runs, axis=0)
        curve(method, ends[method], rates)
    for method in METHODS:
        if method != REPLAY:
            gaps = ends[method] - ends[REPLAY]
            numbers = dict(zip(GAPS, (*gaps[-1], gaps[:, 0].mean()), strict=True))
            write({"method": method, "rate": "", **{k: float(x) for k, x in numbers.items()}})


def used(
    settings: Settings, schedule: np.ndarray, best: float, rng: np.random.Generator
) -> Mapping[str, np.ndarray | float]:
    """The rates of each kind of fresh training."""
    noisy = best + settings.noise * rng.standard_normal(schedule.shape)
    return {
        REPLAY: schedule,
        LAST: float(schedule[-1]),
        SHUFFLED: rng.permutation(schedule),
        FIXED: best,
        PERTURBED: np.clip(noisy, language.RANGE.low, language.RANGE.high),
    }


COLORS = dict(zip(METHODS, ("C0", "k", "0.55", "C1", "C2", "C3"), strict=True))


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the lowest losses so far, and the rates, against training steps."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(12, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {"validation": "lowest validation loss so far", "test": "test loss of these weights"}
    for axis, metric in zip(axes, ("validation", "test", "dropout"), strict=True):
        for method in METHODS if metric != "dropout" else (TUNED, LAST, FIXED):
            steps, mean, se = _band(records, metric, method)
            dash = "--" if method in (LAST, FIXED, PERTURBED) else "-"
            axis.plot(steps, mean, dash, color=COLORS[method], label=method)
            axis.fill_between(steps, mean - se, mean + se, color=COLORS[method], alpha=0.15, lw=0)
        axis.set(xlabel="training steps", title=titles.get(metric, "dropout rate"))
        axis.grid(alpha=0.3)
    grid = list(_grid(records).values())
    at = [_band(records, "validation", TUNED)[0][-1]] * len(grid)
    axes[0].plot(at, grid, "_", color=COLORS[FIXED], label=GRID)
    for axis in axes[:2]:
        axis.set(xscale="log", ylabel="nats per character")
    axes[2].set_ylim(0, 1)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=7)
    return figure


def _band(
    records: list[Record], metric: str, method: str
) -> tuple[list[int], np.ndarray, np.ndarray]:
    found: dict[int, list[float]] = {}
    for r in records:
        if r.metric == metric and r.labels["method"] == method and r.step is not None:
            found.setdefault(r.step, []).append(r.value)
    full = max(map(len, found.values()))
    steps = [step for step, values in found.items() if len(values) == full]
    values = np.array([found[step] for step in steps])
    spread = values.std(axis=1, ddof=1) if full > 1 else np.zeros(len(steps))
    return steps, values.mean(axis=1), spread / np.sqrt(full)


def _grid(records: list[Record]) -> dict[str, float]:
    """The mean validation loss of every fixed rate."""
    found: dict[str, list[float]] = {}
    for r in records:
        if r.labels["method"] == GRID and r.metric == "validation":
            found.setdefault(r.labels["rate"], []).append(r.value)
    return {rate: float(np.mean(values)) for rate, values in found.items()}


def show(records: list[Record]) -> None:
    """Prints the lowest validation loss of every method, the test loss there, and the last rate."""
    for method in METHODS:
        ends = {}
        for metric in ("validation", "test", "dropout"):
            _, means, errors = _band(records, metric, method)
            ends[metric] = curves.text(means[-1], errors[-1])
        print(
            f"{method:>21}: validation {ends['validation']}, test {ends['test']} nats per "
            f"character, last dropout rate {ends['dropout']}"
        )
    cells = ", ".join(f"{rate}: {loss:.4f}" for rate, loss in _grid(records).items())
    print(f"{GRID:>21}: validation losses of fixed rates {cells}")


def claims(summary: Summary) -> list[Claim]:
    """The schedule helps, more than its last value and more than noise."""

    def of(metric, method):
        return summary.find(metric, method=method, rate="")

    says = {
        LAST: "the replayed schedule ends below its own last value, kept fixed",
        FIXED: "the replayed schedule ends below the best fixed rate",
        PERTURBED: "the replayed schedule ends below the best fixed rate with Gaussian noise",
        SHUFFLED: "the order matters: the schedule ends below its own values in random order",
    }
    out = []
    for method, text in says.items():
        kinds = ("validation loss", "test loss", "validation loss, mean along the way")
        for metric, kind in zip(GAPS, kinds, strict=True):
            found = evidence.above(of(metric, method), 0.0)
            source = "our control" if method == SHUFFLED else "MacKay et al. 2019 (PTB, words)"
            ours = f"{method} is above by {found.text} nats"
            out.append(Claim(f"{text} ({kind})", source, ours, found.holds))
    found = evidence.below(of(GAPS[0], TUNED), 0.05)
    ours = f"above the replayed schedule by {found.text} nats"
    says_tuned = "delta_stn itself is within 0.05 nats of its schedule, replayed"
    out.append(Claim(says_tuned, "MacKay et al. 2019 (PTB, words)", ours, found.holds))
    return out


EXPERIMENT = Experiment(
    name="stn_schedules",
    about="A schedule of dropout that a self-tuning network finds, replayed in fresh trainings.",
    settings=Settings,
    scales=SCALES,
    labels=("method", "rate"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    fill=fill,
    would_change=(
        "With an LSTM of 650 units on the words of the Penn Treebank, the order of the replayed "
        "schedule, its last value and the best fixed rate comes out the other way in five seeds "
        "(p < 0.05)."
    ),
)
