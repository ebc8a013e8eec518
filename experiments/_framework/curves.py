"""Curves of experiments that train theta with several estimators, and their last points."""

from typing import Any, Literal, NamedTuple

import numpy as np

from experiments._framework import evidence
from experiments._framework.experiment import Claim
from experiments._framework.results import Record, Summary
from unrollgrad.diagnostics.styles import styles


def curves(
    records: list[Record], metric: str, x: str = "step"
) -> dict[str, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Arrays (x, metric) along each run, by estimator and seed; x is "step" or another metric."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for r in records:
        if r.metric in (metric, x):
            line = found.setdefault((r.labels["estimator"], r.seed), {})
            line.setdefault(r.metric, []).append(r.value)
            if r.metric == metric:
                line.setdefault("step", []).append(float("nan") if r.step is None else r.step)
    out: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for (name, seed), line in found.items():
        if metric in line:
            out.setdefault(name, {})[seed] = np.array(line[x]), np.array(line[metric])
    return out


def plot(axis: Any, records: list[Record], metric: str, x: str = "step") -> None:
    """Draws a line for each estimator: the mean over its seeds, in a band of one standard error."""
    found = curves(records, metric, x)
    for (name, runs), style in zip(found.items(), styles(found).values(), strict=True):
        length = min(len(y) for _, y in runs.values())  # an interrupted run has fewer
        values = np.array([y[:length] for _, y in runs.values()])
        at = next(iter(runs.values()))[0][:length]
        mean = values.mean(axis=0)
        end = {"marker": style.marker, "markevery": [-1]}
        axis.plot(at, mean, style.dash, color=style.color, label=name, **end)
        if len(values) > 1:
            se = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            axis.fill_between(at, mean - se, mean + se, color=style.color, alpha=0.2, lw=0)
    labels = {"step": "outer updates", "inner_steps": "inner steps"}
    axis.set(xlabel=labels.get(x, x))
    axis.grid(alpha=0.3)


def seeds_of(records: list[Record], band: str = "mean ± SE of") -> str:
    """What a picture's lines are: "one seed", or ``band`` with the number of seeds."""
    seeds = len({r.seed for r in records})
    return f"{band} {seeds} seeds" if seeds > 1 else "one seed"


def from_zero(axis: Any) -> None:
    """Lets an axis begin at 0, with room above its highest point."""
    axis.set_ylim(0, 1.06 * axis.dataLim.y1)


def last(records: list[Record], metric: str) -> dict[str, list[float]]:
    """The metric at the end of every run: one number for each seed, by estimator."""
    found = curves(records, metric)
    return {name: [float(y[-1]) for _, y in runs.values()] for name, runs in found.items()}


def show_last(records: list[Record], metric: str, what: str) -> None:
    """Prints the metric at the end of every run."""
    for name, values in last(records, metric).items():
        print(f"{name:>16}  {what}, by seed: " + "  ".join(f"{v:.3g}" for v in values))


def mean_and_se(summary: Summary, metric: str, estimator: str) -> tuple[float, float] | None:
    """The metric at the end; None if it was not measured or is not finite. One seed has SE 0."""
    found = summary.find(metric, estimator=estimator)
    if found is None or not np.isfinite(found["mean"]):
        return None
    return found["mean"], found["se"] or 0.0


def text(mean: float, se: float) -> str:
    """The number and its standard error, as a claim prints them."""
    return evidence.number({"mean": mean, "se": se, "n": 2})


def seeds_text(values: list[float]) -> str:
    """The mean of the seeds' numbers and its standard error; of one seed, the number."""
    if len(values) < 2:
        return f"{values[0]:.4g}"
    return text(float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5)


class Comparison(NamedTuple):
    """The claim that the metrics of two estimators at the end of their runs differ.

    Attributes:
        metric: The metric.
        name: The estimator that is named first.
        relation: How its metric compares with the other's.
        other: The other estimator.
        says: The claim.
        source: The paper that makes the claim, or the theory.
        what: The text before the first number.
        other_metric: The other estimator's metric. Default: the same metric.
    """

    metric: str
    name: str
    relation: Literal["<", ">"]
    other: str
    says: str
    source: str
    what: str = ""
    other_metric: str | None = None


def compare(summary: Summary, comparison: Comparison) -> Claim:
    """Checks the claim by Welch's test over the seeds; see ``evidence.less``."""
    metric, name, relation, other, says, source, what, other_metric = comparison
    mine = summary.find(metric, estimator=name)
    theirs = summary.find(other_metric or metric, estimator=other)
    finding = (evidence.less if relation == "<" else evidence.more)(mine, theirs)
    return Claim(says, source, what + finding.text, finding.holds)
