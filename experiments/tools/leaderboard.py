"""``leaderboard``: every problem, every estimator that fits, and the recommendation beside them."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

import unrollgrad as ug
from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.problems import PROBLEMS
from experiments.tools.diagnose import best_rows
from unrollgrad.running import need

COSTS = ("steps", "seconds")
"""What is equal for all estimators of a column."""

FARTHEST = 1e4
"""Larger errors are drawn here, with an arrow: one estimator's 1e40 would squash all others."""

EQUAL = 1e-6
"""Squared errors of less than a thousandth of the gradient are equal."""


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Which estimator is best on which problem, and would `diagnose` have said so?

    `diagnose` ranks the estimators of every problem, and `compare` then measures those that fit,
    at the sigma of the diagnosis: the mean squared error of what the budget allows, over |g|^2, at
    equal inner steps (as papers count: backward steps are free) and at equal seconds. An estimator
    fits if it is admissible and one episode of it costs at most the budget.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings."""
    problems: tuple[Literal[tuple(PROBLEMS)], ...] = tuple(PROBLEMS)  # type: ignore[valid-type]
    """The problems, each with its own horizon and truncation."""
    estimators: tuple[Literal[tuple(ug.REGISTRY)], ...] = tuple(ug.REGISTRY)  # type: ignore[valid-type]
    """The estimators."""
    horizon: int | None = None
    """Inner steps per episode (T), of all problems. Default: each problem's."""
    num_workers: int = 32
    """Antithetic pairs whose cost for one episode is the budget."""
    num_samples: int = 64
    """Independent samples of every estimator, one worker each."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole repetition."""


SCALES = {
    "smoke": Settings(
        scale="smoke",
        problems=("linear_recurrence",),
        estimators=("pes", "es_single"),
        horizon=8,
        num_workers=4,
        num_samples=8,
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_workers=500, num_samples=1000, seeds=(0, 1, 2)),
}


class Case(NamedTuple):
    """A problem at a theta, as it is measured.

    Attributes:
        problem: The inner loop.
        theta: The outer parameters.
        horizon: T.
        truncation: K.
        reference: The estimator whose mean counts as the true gradient.
    """

    problem: ug.UnrolledProblem
    theta: Any
    horizon: int
    truncation: int
    reference: str


@functools.cache
def case(name: str, horizon: int | None) -> Case:
    """The problem with this horizon, or its own, and at least four windows."""
    choice = PROBLEMS[name]
    horizon = choice.horizon if horizon is None else horizon
    problem, theta, *_ = choice.make(horizon)
    divisors = [k for k in range(1, horizon + 1) if horizon % k == 0]
    truncation = max(k for k in divisors if k <= min(choice.truncation, max(horizon // 4, 1)))
    return Case(problem, theta, horizon, truncation, choice.reference)


def run(settings: Any, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes a row for every problem and estimator: predicted, and measured."""
    for i, name in enumerate(settings.problems):
        it = case(name, settings.horizon)

        def report(text: str, done: float, i: int = i, name: str = name) -> None:
            progress(f"{name}: {text}", (i + done) / len(settings.problems))

        report("diagnosing", 0.0)
        found = ug.diagnostics.diagnose(
            it.problem,
            it.theta,
            key=jax.random.key(seed),
            truncation=it.truncation,
            num_workers=settings.num_workers,
        )
        for row in _measured(it, found, settings, seed, report):
            write({"problem": name, **row})


def _measured(
    it: Case, found: ug.diagnostics.Diagnosis, settings: Any, seed: int, report: Progress
) -> list[dict[str, Any]]:
    """What ``compare`` finds for all that fit, beside what was predicted."""
    predicted = best_rows(found)
    budget_seconds = 2 * settings.num_workers * it.horizon * found.measurements.cost.forward
    fit = {
        name: predicted[name].settings if name in predicted else {}
        for name in settings.estimators
        if name not in predicted
        or (predicted[name].admissible and predicted[name].seconds <= budget_seconds)
    }
    common = {"truncation": it.truncation, "sigma": found.measurements.details.sigma}
    common["noise_period"] = 2 * it.truncation
    estimators = {
        name: ug.REGISTRY[name].build(it.problem, **{**common, **changes})
        for name, changes in fit.items()
        if found.measurements.derivatives is not None or not _needs_derivatives(name)
    }
    rows = ug.diagnostics.compare(
        it.problem,
        it.theta,
        estimators,
        reference=ug.REGISTRY[it.reference].build(it.problem, **common, num_pairs=16),
        num_samples=settings.num_samples,
        num_chains=0,
        batch_size=settings.num_samples,
        key=jax.random.fold_in(jax.random.key(7), seed),
        progress=lambda name, part, of: report(name.strip(), 0.5),
    ).rows
    steps = 2 * settings.num_workers * it.horizon
    pairs = [settings.num_workers * r["seconds"] for r in rows if r["name"] == "es_single"]
    spend = {"inner_steps": steps, "seconds": [*pairs, budget_seconds][0]}
    chosen = next((name for name in predicted if name in estimators), None)
    return [
        {
            **_errors(row, spend),
            "predicted": predicted[name].nmse if name in predicted else math.nan,
            "recommended": float(name == chosen),
            "tied": float(name in predicted and predicted[name].tied),
        }
        for row in rows
        for name in [row["name"]]
    ]


def _needs_derivatives(name: str) -> bool:
    return ug.REGISTRY[name].reverse_mode or name in ("forward_mode", "dodge", "uoro")


def _errors(row: dict[str, Any], budget: dict[str, float]) -> dict[str, Any]:
    """The measured errors at both budgets: bias^2, and the variance that so many workers leave."""
    norm = row["reference_norm"] ** 2
    bias = max(row["squared_bias"], 0.0) + EQUAL * norm
    steps, seconds = (
        (bias + row["variance"] * row[cost] / budget[cost]) / norm
        for cost in ("inner_steps", "seconds")
    )
    return {"estimator": row["name"], "steps": steps, "seconds": seconds}


Board = dict[str, dict[str, dict[str, float]]]
"""Numbers by problem, estimator and metric."""


def board(records: list[Record]) -> Board:
    """The mean over seeds of all numbers."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for r in records:
        found.setdefault((r.labels["problem"], r.labels["estimator"], r.metric), []).append(r.value)
    out: Board = {}
    for (problem, estimator, metric), values in found.items():
        out.setdefault(problem, {}).setdefault(estimator, {})[metric] = float(np.mean(values))
    return out


def regrets(found: Board) -> dict[str, float]:
    """The recommended estimator's error over the least one, at equal seconds, by problem."""
    out = {}
    for problem, rows in found.items():
        least = min(
            (r["seconds"] for r in rows.values() if math.isfinite(r["seconds"])), default=math.nan
        )
        chosen = max(rows.values(), key=lambda r: r["recommended"])
        out[problem] = chosen["seconds"] / least if chosen["recommended"] else math.nan
    return out


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws every estimator's error on every problem; a ring marks what `diagnose` recommends."""
    found = board(records)
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(13, 1.5 + 0.55 * max(len(found), 4)), layout="constrained"
    )
    axes = figure.subplots(1, 2, sharey=True)
    for axis, cost in zip(axes, COSTS, strict=True):
        for name, style in curves.styles(names).items():
            here = [(rows[name][cost], i) for i, rows in enumerate(found.values()) if name in rows]
            x, y = zip(*here, strict=True)
            shown = np.minimum(x, FARTHEST)
            axis.plot(shown, y, style.marker, color=style.color, label=name, ms=7, alpha=0.85)
            for at in np.array(y)[np.array(x) > FARTHEST]:
                axis.annotate("→", (FARTHEST, at), (6, -3), textcoords="offset points")
        for i, rows in enumerate(found.values()):
            chosen = max(rows.values(), key=lambda r: r["recommended"])
            if chosen["recommended"]:
                axis.plot(chosen[cost], i, "o", mfc="none", mec="k", ms=15, mew=1.5)
        axis.axvline(1, color="grey", lw=0.8)
        axis.set(
            xscale="log",
            xlabel="mean squared error / |g|² (left is better; →: farther to the right)",
            title=f"measured at equal {'inner ' * (cost == 'steps')}{cost}, those of "
            f"{config['num_workers']} antithetic pairs",
        )
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    axes[1].plot([], [], "o", mfc="none", mec="k", ms=12, label="recommended by diagnose")
    axes[1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return figure


def show(records: list[Record]) -> None:
    """Prints a table for every problem, the best at equal seconds first."""
    found = board(records)
    ratio = regrets(found)
    for problem, rows in found.items():
        print(f"{problem}: error / |g|² at equal steps and at equal seconds, and as predicted")
        for name in sorted(rows, key=lambda n: rows[n]["seconds"]):
            row = rows[name]
            mark = "recommended" if row["recommended"] else "tied" if row["tied"] else ""
            numbers = "  ".join(f"{row[k]:>9.3g}" for k in (*COSTS, "predicted"))
            print(f"{name:>26}  {numbers}  {mark}")
        print(f"{'':>26}  the recommended one has {ratio[problem]:.3g} times the least error")


def claims(summary: Summary) -> list[Claim]:
    """The recommendation against the truth, and against always taking the same estimator."""
    records = [
        Record(
            0, None, {"problem": r["problem"], "estimator": r["estimator"]}, r["metric"], r["mean"]
        )
        for r in summary.results
    ]
    found = board(records)
    ratio = list(regrets(found).values())
    known = [
        r[k] for rows in found.values() for r in rows.values() for k in ("seconds", "recommended")
    ]
    unknown = "" if all(map(math.isfinite, known)) else "; a number is not finite"
    middle, ninth = float(np.median(ratio)), float(np.quantile(ratio, 0.9))
    text = f"median {evidence.shown(middle)}, ninth decile {evidence.shown(ninth)} of {len(ratio)}"
    says = "diagnose's choice has at most 1.05 times the least error (median), 1.5 times (90 %)"
    holds = evidence.told(middle <= 1.05 and ninth <= 1.5, middle, ninth, *known)
    out = [Claim(says, "expectation", f"{text} problems{unknown}", holds)]
    names = dict.fromkeys(name for rows in found.values() for name in rows)
    fixed = {name: _always(found, name) for name in names}
    usable = {name: x for name, x in fixed.items() if math.isfinite(x)}
    best = min(usable, key=lambda name: usable[name], default="none")
    mine, others = float(np.mean(np.log(ratio))), usable.get(best, math.nan)
    text = f"geometric means {_exp(mine)} against {_exp(others)} ({best}){unknown}"
    says = "diagnose's choices have no more error than the best single estimator for all problems"
    holds = evidence.told(mine <= others, mine, others, *known)
    return [*out, Claim(says, "expectation", text, holds)]


def _exp(x: float) -> str:
    return evidence.shown(math.exp(x) if x < 700 else math.inf)


def _always(found: Board, name: str) -> float:
    """The mean logarithm of a fixed choice's error over the least; NaN where it does not fit."""
    logs = []
    for rows in found.values():
        least = min(
            (r["seconds"] for r in rows.values() if math.isfinite(r["seconds"])), default=math.nan
        )
        logs.append(np.log(rows[name]["seconds"] / least) if name in rows else math.nan)
    return float(np.mean(logs))


EXPERIMENT = Experiment(
    name="leaderboard",
    about="Every problem, every estimator that fits: errors at equal steps and at equal seconds.",
    settings=Settings,
    scales=SCALES,
    labels=("problem", "estimator"),
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "With 1000 samples on an accelerator, diagnose's choices have over 1.05 times the least "
        "error at the median, or over 1.5 times on more than one problem in ten."
    ),
)
