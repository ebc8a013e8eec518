"""``diagnose``: which gradient estimator to use on a problem, predicted and said in words."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import jax

import unrollgrad as ug
from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Experiment, Progress, Write
from experiments._framework.results import Record, Summary
from experiments._framework.settings import CommonSettings
from experiments.problems import PROBLEMS
from unrollgrad.running import need


@dataclasses.dataclass(frozen=True)
class Settings(CommonSettings):
    """Ask which gradient estimator to use on a problem: one measurement, a ranking with reasons.

    The table is printed: every estimator's predicted error at the cost of so many workers, the
    workers with which signal equals noise, time, memory, and why it stands where it does; below it
    the verdict in sentences, and what would change it. The results' folder has for every seed a
    folder `diagnosis-SEED` with the ranking, all numbers, and a picture of errors, sigma and
    windows. `variance --problem NAME` measures the same errors one by one, which takes longer.
    """

    scale: Literal["smoke", "cpu", "paper"] = "cpu"
    """Sets the defaults of all other settings. smoke: short episodes. cpu: as `variance` measures.
    paper: many workers."""
    problem: Literal[tuple(PROBLEMS)] = "digits"  # type: ignore[valid-type]
    """What is unrolled. `python -m experiments list` describes them all."""
    num_workers: int = 32
    """Workers that you can pay for, each an antithetic pair: they set the budget."""
    memory_limit: int | None = None
    """Bytes that all workers together may hold; estimators that need more stand last. Default: no
    limit."""
    sigma: float | None = None
    """Standard deviation of the perturbation, in theta's units. Default: a sweep chooses."""
    truncation: int | None = None
    """Inner steps per window (K). Default: the problem's."""
    horizon: int | None = None
    """Inner steps per episode (T). Default: the problem's."""
    seeds: tuple[int, ...] = (0,)
    """Each seed is a whole diagnosis. Two show whether the verdict is sure."""


SCALES = {
    "smoke": Settings(
        scale="smoke", problem="toy_regression", horizon=8, truncation=2, num_workers=4
    ),
    "cpu": Settings(),
    "paper": Settings(scale="paper", num_workers=500, seeds=(0, 1, 2)),
}


def filled(settings: Settings) -> Settings:
    """The settings with the problem's defaults; sigma stays None, since the sweep chooses it."""
    choice = PROBLEMS[settings.problem]
    return dataclasses.replace(
        settings,
        horizon=choice.horizon if settings.horizon is None else settings.horizon,
        truncation=choice.truncation if settings.truncation is None else settings.truncation,
    )


def run(settings: Any, seed: int, folder: Path, write: Write, progress: Progress) -> None:
    """Writes a row for every estimator, prints the table, and saves the whole diagnosis."""
    progress("diagnosing", 0.0)
    problem, theta, *_ = PROBLEMS[settings.problem].make(settings.horizon)
    found = ug.diagnostics.diagnose(
        problem,
        theta,
        key=jax.random.key(seed),
        truncation=settings.truncation,
        num_workers=settings.num_workers,
        memory_limit=settings.memory_limit,
        sigma=settings.sigma,
    )
    if jax.process_index() == 0:
        found.table()
        found.save(folder / f"diagnosis-{seed}")
    for name, row in best_rows(found).items():
        write({"estimator": name, **numbers(row, found)})


def best_rows(found: ug.diagnostics.Diagnosis) -> dict[str, ug.diagnostics.RankedEstimator]:
    """The first row of every estimator, in the ranking's order."""
    rows: dict[str, ug.diagnostics.RankedEstimator] = {}
    for row in found.ranking:
        rows.setdefault(row.name, row)
    return rows


def numbers(
    row: ug.diagnostics.RankedEstimator, found: ug.diagnostics.Diagnosis
) -> dict[str, float]:
    """A row's numbers, by metric."""
    return {
        "predicted": row.nmse,
        "predicted_se": row.nmse_se,
        "recommended": float(row is found.recommendation),
        "tied": float(row.tied),
        "admissible": float(row.admissible),
        "workers": row.workers,
        "seconds": row.seconds,
        "bytes": float("nan") if row.bytes is None else row.bytes,
        "sigma": found.measurements.details.sigma,
    }


def rows(records: list[Record]) -> dict[str, dict[str, float]]:
    """The mean over seeds of every number, by estimator."""
    found: dict[str, dict[str, list[float]]] = {}
    for r in records:
        found.setdefault(r.labels["estimator"], {}).setdefault(r.metric, []).append(r.value)
    return {
        name: {metric: sum(x) / len(x) for metric, x in line.items()}
        for name, line in found.items()
    }


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the predicted errors, the best on top."""
    found = rows(records)
    order = sorted(
        found, key=lambda name: (not found[name]["admissible"], found[name]["predicted"])
    )
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    values = [found[n]["predicted"] for n in order if found[n]["admissible"] == 1]
    positive = [v for v in values if 0 < v < 1e6]
    low = min(positive, default=0.1) / 2
    high = 4 * max([*positive, 1.0])
    for i, (name, style) in enumerate(curves.styles(order).items()):
        row = found[name]
        if row["admissible"] < 1:
            axis.annotate("not admissible", (low, i), color="0.4", va="center")
            continue
        x = min(max(row["predicted"], low), high)
        error = [[min(row["predicted_se"], 0.9 * x)], [min(row["predicted_se"], high)]]
        label = "recommended" if row["recommended"] > 0.5 else "tied" if row["tied"] > 0.5 else ""
        axis.errorbar(x, i, xerr=error, fmt=style.marker, color=style.color, capsize=3)
        axis.annotate(label, (x, i), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axis.set_yticks(range(len(order)), order)
    axis.set_ylim(len(order) - 0.5, -0.7)
    axis.axvline(1, color="grey", lw=0.8)
    axis.set(
        xscale="log",
        xlim=(low / 1.5, high),
        xlabel="predicted mean squared error / |g|² (1: as large as the gradient)",
        title=f"{config['problem']}: at the cost of {config['num_workers']} antithetic pairs "
        f"({curves.seeds_of(records, 'mean of')})",
    )
    axis.grid(alpha=0.3)
    return figure


def show(records: list[Record]) -> None:
    """Prints the ranking in one line for each estimator."""
    for name, row in rows(records).items():
        if row["admissible"] < 1:
            print(f"{name:>24}  not admissible")
            continue
        mark = "  recommended" if row["recommended"] > 0.5 else "  tied" if row["tied"] else ""
        print(f"{name:>24}  predicted error {row['predicted']:.3g}{mark}")


def claims(summary: Summary) -> list[Claim]:
    """The verdict is the same in every seed, or its rivals are said to be tied."""
    seeds = len(summary.about["config"]["seeds"])
    found = {
        metric: {r["estimator"]: r["mean"] for r in summary.results if r["metric"] == metric}
        for metric in ("recommended", "tied")
    }
    chosen = {name: share for name, share in found["recommended"].items() if share != 0}
    sure = all(found["tied"][name] >= 1 for name in chosen)
    text = ", ".join(f"{name} in {evidence.shown(x, '.0%')}" for name, x in chosen.items())
    values = [*found["recommended"].values(), *found["tied"].values()]
    if not all(map(math.isfinite, values)):
        text += "; not finite"
    holds = evidence.told(sure, *values) if seeds > 1 else None
    says = "the verdict does not flip between seeds without a tie"
    return [Claim(says, "expectation", f"of {seeds} seeds: {text}", holds)]


EXPERIMENT = Experiment(
    name="diagnose",
    about="Which estimator to use on a problem: a ranking of predicted errors, with reasons.",
    settings=Settings,
    scales=SCALES,
    labels=("estimator",),
    fill=filled,
    run=run,
    draw=draw,
    show=show,
    claims=claims,
    would_change=(
        "On one of the problems that come with the repository, `variance` with 1000 samples finds "
        "another estimator over 1.5 times better than the recommended one at equal seconds."
    ),
    title=lambda settings: f"diagnose-{settings.problem}",
)
