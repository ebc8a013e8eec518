"""The picture, the numbers and the claims of ``long_run_variance``."""

import math
from typing import Any

import numpy as np

from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim
from experiments._framework.results import Record, Summary
from unrollgrad.running import need

RECURRENCES = ("aligned", "independent", "conflicting")


UPDATES = ("1", "n", "20n")
"""Names of the numbers of updates."""


def _table(records: list[Record]) -> dict[tuple[str, str, str], dict[str, np.ndarray]]:
    """Each metric's numbers by seed, for every problem, estimator and number of updates."""
    out: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for r in records:
        key = r.labels["problem"], r.labels["estimator"], r.labels["updates"]
        out.setdefault(key, {}).setdefault(r.metric, []).append(r.value)
    return {k: {m: np.array(x) for m, x in metrics.items()} for k, metrics in out.items()}


def _pooled(metrics: dict[str, np.ndarray]) -> tuple[float, float]:
    """The mean variance over seeds, and its standard error from the errors of all seeds."""
    errors = metrics["variance_se"]
    return float(metrics["variance"].mean()), float(np.sqrt(np.sum(errors**2)) / len(errors))


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws a panel for each problem and a line for each estimator; crosses are closed forms."""
    problems = config["problems"]
    columns = min(3, len(problems))
    rows = -(-len(problems) // columns)
    figure = need("matplotlib.figure", "matplotlib").Figure(
        figsize=(1 + 3.3 * columns, 1 + 3.3 * rows), layout="constrained"
    )
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(problems) :]:
        axis.remove()
    table = _table(records)
    for axis, problem in zip(axes.flat, problems, strict=False):
        _panel(axis, table, problem, config)
    figure.supylabel("variance of the mean of U updates, per episode-pair spent, / |g|²")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _panel(axis: Any, table: Any, problem: str, config: dict[str, Any]) -> None:
    windows = config["num_windows"]
    places = dict(zip(UPDATES, (1, windows, 20 * windows), strict=True))
    styles = curves.styles(config["estimators"])
    for i, (name, (color, marker, _)) in enumerate(styles.items()):
        shift = 1.13 ** (i - 2.5)  # so that equal lines do not hide each other
        here = {u: table[problem, name, u] for u in UPDATES if (problem, name, u) in table}
        at = [places[u] * shift for u in here]
        means, errors = np.array([_pooled(x) for x in here.values()]).reshape(-1, 2).T
        style = "--" if "staggered" in name or name == "nres" else "-"
        look: Any = {"marker": marker, "ls": style, "color": color, "ms": 4}
        axis.errorbar(at, means, errors, **look, capsize=3, label=name)
        known = [x["exact"].mean() for x in here.values() if "exact" in x]
        if known:
            axis.plot(at, known, "kx", ms=6, label=None if i else "closed form")
    axis.set(xscale="log", yscale="log", xlabel="U, consecutive updates", title=problem)
    axis.set_xticks(list(places.values()), ["1", "n", "20 n"])
    axis.set_xticks([], minor=True)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.tick_params(which="both", labelsize=8)
    axis.grid(alpha=0.3)


def show(records: list[Record]) -> None:
    """Prints the variances, and in brackets the closed forms."""
    lines: dict[tuple[str, str], list[str]] = {}
    for (problem, name, updates), metrics in _table(records).items():
        mean, se = _pooled(metrics)
        text = f"{updates}: {mean:.3g} ± {se:.1g}"
        text += f" ({metrics['exact'].mean():.3g})" if "exact" in metrics else ""
        lines.setdefault((problem, name), []).append(text)
    print("variance of the mean of U updates, per episode-pair, / |g|^2 (closed form)")
    for (problem, name), parts in lines.items():
        print(f"{problem:>12} {name:>13}  " + "   ".join(parts))


def claims(summary: Summary) -> list[Claim]:
    """NRES and ES-Single equal full ES in the long run; PES has less or more as gradients agree."""
    config = summary.about["config"]
    measured = config["estimators"]
    out = []
    for problem in config["problems"]:
        if problem in RECURRENCES:
            out.append(_exact_claim(summary, problem))
        if "full_es" in measured:
            out += [_same_claim(summary, problem, name) for name in EQUAL if name in measured]
            out += [
                _pes_claim(summary, problem, name, less=problem == "aligned")
                for name in ("pes", "pes staggered")
                if name in measured and problem in RECURRENCES
            ]
    return out


SOURCE = "theory, for quadratic losses"

BLIND = 0.3
"""A ratio whose standard error is above this fraction decides nothing."""

EQUAL = ("es_single", "nres")
"""Estimators whose long-run variance equals full ES's."""

CUT = 1 / 20
"""A worker of nres that begins inside an episode sees the ends of two episodes, not a whole one."""


def _value(summary: Summary, problem: str, name: str, updates: str) -> evidence.Result | None:
    """The variance, with its standard error from the samples of all seeds."""
    config = summary.about["config"]
    labels = {"problem": problem, "estimator": name, "updates": updates}
    value, error = (summary.find(metric, **labels) for metric in ("variance", "variance_se"))
    real = problem not in RECURRENCES
    return evidence.of_samples(value, error, config["num_samples_real" if real else "num_samples"])


def _ratio(summary: Summary, problem: str, name: str) -> evidence.Result | None:
    """The long-run variance over full ES's."""
    return evidence.ratio(*(_value(summary, problem, x, "20n") for x in (name, "full_es")))


def _exact_claim(summary: Summary, problem: str) -> Claim:
    ratios = {}
    for name in summary.about["config"]["estimators"]:
        for updates in UPDATES:
            labels = {"problem": problem, "estimator": name, "updates": updates}
            value, exact = _value(summary, problem, name, updates), summary.find("exact", **labels)
            if value is not None and exact is not None:
                share = 1 / exact["mean"] if exact["mean"] else math.nan
                ratios[f"{name} at U = {updates}"] = evidence.times(value, share)
    away = {k: abs(r["mean"] - 1) / r["se"] if r["se"] else math.nan for k, r in ratios.items()}
    worst = max(away, key=lambda k: away[k] if math.isfinite(away[k]) else math.inf)
    errors = [r["se"] for r in ratios.values()]
    tests = [evidence.agrees(r, 1.0, 1.0, blind=BLIND, errors=4.0) for r in ratios.values()]
    return Claim(
        f"{problem}: all {len(away)} variances equal the closed forms, within four standard errors",
        SOURCE,
        f"at most {evidence.shown(away[worst], '.2g')} standard errors away ({worst}); these are "
        f"{100 * min(errors):.1g} to {100 * max(errors):.1g} % of the closed forms",
        evidence.both(*tests),
    )


def _same_claim(summary: Summary, problem: str, name: str) -> Claim:
    ratio = _ratio(summary, problem, name)
    end = CUT if name == "nres" else 0.0
    besides = f" and the {100 * end:.0f} % of the one episode in 20 that is cut" if end else ""
    blind = BLIND * ratio["mean"] if ratio else 0.0
    same = evidence.agrees(ratio, 1 - end, 1 + end, blind)
    return Claim(
        f"{problem}: in the long run {name} has full_es's variance per episode-pair, within three "
        f"standard errors{besides}",
        SOURCE,
        f"ratio {same.text}",
        same.holds,
    )


def _pes_claim(summary: Summary, problem: str, name: str, less: bool) -> Claim:
    share = summary.about["config"]["num_windows"] / 4
    what = "less than full_es's" if less else f"at least {share:.3g} = n/4 times full_es's"
    ratio = _ratio(summary, problem, name)
    test = evidence.below(ratio, 1.0) if less else evidence.above(ratio, share)
    return Claim(
        f"{problem}: in the long run {name}'s variance per episode-pair is {what}",
        SOURCE,
        f"ratio {test.text}",
        test.holds,
    )
