"""The picture, the numbers and the claims of ``variance_lstm``."""

import math
from typing import Any

import numpy as np

from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim
from experiments._framework.results import Record, Summary
from unrollgrad.running import need

TEXTS = {
    "real": "an excerpt of the corpus",
    "random": "uniformly random characters",
    "repeated": "one repeated character",
}
"""The texts of the LSTM: their window gradients are natural, conflict, or agree."""


OTHER_SIGMA = 3.0
"""A multiple of sigma, which must give the same variance."""


def _series(records: list[Record], metric: str) -> dict[tuple[str, str], dict[int, list[float]]]:
    """The metric by (text, estimator) and number of unrolls, with a number for each seed."""
    out: dict[tuple[str, str], dict[int, list[float]]] = {}
    for r in records:
        if r.metric == metric:
            line = out.setdefault((r.labels["text"], r.labels["estimator"]), {})
            line.setdefault(int(r.labels["unrolls"]), []).append(r.value)
    return out


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws a panel for each text: measured points with standard errors, the closed form as lines.

    Both are means over seeds.
    """
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, len(TEXTS), sharey=True)
    variances, exact = _series(records, "variance"), _series(records, "exact")
    for axis, (text, about) in zip(axes, TEXTS.items(), strict=True):
        for name, (color, marker, _) in curves.styles(config["estimators"]).items():
            line = variances.get((text, name), {})
            means = [np.mean(x) for x in line.values()]
            errors = [
                np.std(x, ddof=1) / np.sqrt(len(x)) if len(x) > 1 else 0 for x in line.values()
            ]
            axis.errorbar(
                list(line), means, errors, fmt=marker, color=color, ms=5, capsize=3, label=name
            )
            line = exact.get((text, name), {})
            axis.plot(list(line), [np.mean(x) for x in line.values()], color=color, lw=1)
        axis.set(xscale="log", yscale="log", xlabel="unrolls per episode, n = T/K", title=about)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="variance of an episode's mean / |g|²")
    axes[0].legend(title="measured; lines: closed form")
    return figure


def show(records: list[Record]) -> None:
    """Prints the means over seeds of the variances and, in brackets, of the closed form."""
    variances, exact = _series(records, "variance"), _series(records, "exact")
    for (text, name), line in variances.items():
        known = exact.get((text, name), {})
        parts = [
            f"{n}: {np.mean(x):.4g}" + (f" ({np.mean(known[n]):.4g})" if n in known else "")
            for n, x in line.items()
        ]
        print(
            f"{text:>9} {name:>10}  variance / |g|^2 by unrolls (closed form)  " + "  ".join(parts)
        )


def claims(summary: Summary) -> list[Claim]:
    """ES-Single does not depend on the unrolls; PES follows its closed form and crosses it."""
    found = [
        *(_slope_claim(summary, text) for text in TEXTS),
        *(_exact_claim(summary, text, name) for name in ("pes", "gpes") for text in TEXTS),
        *(_order_claim(summary, text, above) for text, above in ABOVE.items()),
        _dip_claim(summary),
        _sigma_claim(summary),
    ]
    return [claim for claim in found if claim is not None]


ABOVE = {"random": True, "repeated": False}
"""Whether pes's variance is above es_single's with many unrolls."""


def _slope_claim(summary: Summary, text: str) -> Claim | None:
    found = summary.find("slope", text=text, estimator="es_single", unrolls="all")
    if found is None:
        return None
    flat = evidence.within(found, -0.1, 0.1)
    return Claim(
        f"{text} text: es_single's variance does not depend on the number of unrolls",
        "Vicol et al. 2023, Fig. 1 and Prop. 3.2",
        f"slope of log variance over log unrolls {flat.text}, within 0.1 of 0",
        flat.holds,
    )


def _exact_claim(summary: Summary, text: str, name: str) -> Claim | None:
    """Each ratio's error is that of the samples: another seed has other weights and texts."""
    tests = {}
    for unrolls in sorted(summary.about["config"]["num_windows"]):
        labels = {"text": text, "estimator": name, "unrolls": str(unrolls)}
        ratio, variance, error = (
            summary.find(metric, **labels) for metric in ("ratio", "variance", "variance_se")
        )
        if ratio and variance and error:
            samples = summary.about["config"]["num_samples"]
            relative = {**error, "mean": error["mean"] / variance["mean"] * ratio["mean"]}
            measured = evidence.of_samples(ratio, relative, samples)
            tests[unrolls] = evidence.within(measured, 0.85, 1.15)
    if not tests:
        return None
    return Claim(
        f"{text} text: {name}'s variance is within 15 % of the exact formula on measured window "
        "gradients",
        "theory, for quadratic losses",
        "ratio by unrolls: " + ", ".join(f"{n}: {test.text}" for n, test in tests.items()),
        evidence.both(*tests.values()),
    )


def _order_claim(summary: Summary, text: str, above: bool) -> Claim | None:
    largest = str(max(summary.about["config"]["num_windows"]))
    pes = summary.find("variance", text=text, estimator="pes", unrolls=largest)
    single = summary.find("variance", text=text, estimator="es_single", unrolls=largest)
    if pes is None or single is None:
        return None
    ordered = (evidence.more if above else evidence.less)(pes, single)
    return Claim(
        f"{text} text: with {largest} unrolls pes's variance is {'above' if above else 'below'} "
        "es_single's",
        "Vicol et al. 2023, Fig. 1",
        ordered.text,
        ordered.holds,
    )


def _dip_claim(summary: Summary) -> Claim | None:
    """The number of unrolls with the dip is that of the closed forms, not the luckiest one."""
    measured, exact = {}, {}
    for unrolls in sorted(summary.about["config"]["num_windows"]):
        labels = {"text": "real", "unrolls": str(unrolls)}
        pes, single, exact_pes, exact_single = (
            summary.find(metric, estimator=name, **labels)
            for metric in ("variance", "exact")
            for name in ("pes", "es_single")
        )
        if pes and single:
            measured[unrolls] = pes, single
        if exact_pes and exact_single:
            exact[unrolls] = exact_pes["mean"] / exact_single["mean"]
    if not measured or not exact:
        return None
    least, most = min(exact, key=lambda n: exact[n]), max(measured)
    dips, grows = evidence.less(*measured[least]), evidence.more(*measured[most])
    text = f"{dips.text} with {least} unrolls, {grows.text} with {most}"
    if not all(map(math.isfinite, exact.values())):
        text += "; a closed form diverged"
    return Claim(
        "real text: with more unrolls pes's variance first falls below es_single's, then grows "
        "above it",
        "Vicol et al. 2023, Fig. 1",
        text,
        evidence.told(evidence.both(dips, grows), *exact.values()),
    )


def _sigma_claim(summary: Summary) -> Claim | None:
    changes = []
    for r in summary.results:
        if r["metric"] == "other_sigma":
            labels = {k: r[k] for k in ("text", "estimator", "unrolls")}
            same = summary.find("variance", **labels)
            changes += [] if same is None else [r["mean"] / same["mean"] - 1]
    if not changes:
        return None
    worst = float(changes[np.argmax(np.abs(changes))])  # NaN if one is
    return Claim(
        "neither smoothing nor rounding shows in the variances: "
        f"{OTHER_SIGMA:.0f} times sigma gives the same within 2 %",
        "Vicol et al. 2021 (sigma 0.001)",
        f"{evidence.shown(100 * worst, '+.2g')} % at most, pes with the most unrolls and "
        "the same noise",
        evidence.told(abs(worst) < 0.02, worst),
    )
