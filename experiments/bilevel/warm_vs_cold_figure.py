"""The figure of ``warm_vs_cold``, and the lookup of its records."""

from typing import Any

import numpy as np

from experiments._framework import curves
from experiments._framework.results import Record
from experiments.problems.fourier import TARGETS, grid
from unrollgrad.running import need

BOUND = 0.8
"""Bound of the claims, as a ratio to the cold start's outer loss."""
WIDEST = 2.0
"""Larger ratios are drawn at this value."""
COLORS = {"cold": "C0", "warm": "C3", "re-trained": "C1"}


def chosen(
    records: list[Record], part: str, metric: str, case: str | None = None
) -> dict[tuple[str, str], dict[tuple[int, int | None], float]]:
    """Values by (case, method), then by (seed, step)."""
    out: dict[tuple[str, str], dict[tuple[int, int | None], float]] = {}
    for r in records:
        if r.metric == metric and r.labels["part"] == part and case in (None, r.labels["case"]):
            series = out.setdefault((r.labels["case"], r.labels["method"]), {})
            series[r.seed, r.step] = r.value
    return out


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws losses and ratios of "one point", and targets and distances of "antidistillation"."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 8), layout="constrained")
    (losses, ratios), (targets, distances) = figure.subplots(2, 2)
    _draw_losses(losses, records, config)
    _draw_ratios(ratios, records)
    _draw_targets(targets, records)
    _draw_distances(distances, records)
    return figure


def _draw_losses(axis: Any, records: list[Record], config: dict[str, Any]) -> None:
    cases = [case for case, _ in chosen(records, "one point", "loss")]
    adam = [case for case in cases if case.startswith(config["targets"][0]) and " adam " in case]
    case = (adam or cases)[-1]
    for (_, method), values in chosen(records, "one point", "loss", case).items():
        seeds = dict.fromkeys(seed for seed, _ in values)
        steps = list(dict.fromkeys(step for _, step in values))
        complete = [seed for seed in seeds if (seed, steps[-1]) in values]
        lines = [[values[seed, step] for step in steps] for seed in complete]
        if not lines:
            continue
        for line in lines if method != "re-trained" else ():
            axis.plot(steps, line, color=COLORS[method], alpha=0.2, linewidth=0.7)
        label = f"{method} from zero, warm's theta" if method == "re-trained" else method
        axis.plot(steps, np.mean(lines, axis=0), color=COLORS[method], linewidth=2, label=label)
    shown = curves.seeds_of(records, "mean and")
    axis.set(xlabel="outer steps", ylabel="outer loss", title=f"one point: {case}; {shown}")
    axis.set_ylim(0, None)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right")


def _draw_ratios(axis: Any, records: list[Record]) -> None:
    found = chosen(records, "one point", "over_cold")
    for i, case in enumerate(dict.fromkeys(case for case, _ in found)):
        warm, again = found.get((case, "warm"), {}), found.get((case, "re-trained"), {})
        both = [key for key in warm if key in again]
        axis.plot(
            [min(warm[key], WIDEST) for key in both],
            [min(again[key], WIDEST) for key in both],
            linestyle="none",
            marker="o" if case.startswith("alternating") else "x",
            color=f"C{i}",
            label=case,
        )
    axis.axvline(BOUND, color="black", linewidth=0.8)
    axis.axhline(BOUND, color="black", linewidth=0.8)
    axis.set(
        xlabel=f"warm / cold, outer loss (above {WIDEST:g} drawn there)",
        ylabel="re-trained with warm's last theta / cold",
        title=f"one point: every seed, lines at {BOUND}",
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def _draw_targets(axis: Any, records: list[Record]) -> None:
    found = chosen(records, "antidistillation", "target")
    if not found:
        return
    seed = records[0].seed
    for (case, method), values in found.items():
        if method == "damping" or case == "minimum" or (seed, TARGETS - 1) not in values:
            continue
        line = [values[seed, i] for i in range(TARGETS)]
        axis.plot(grid(), line, marker=".", label=case)
    real = {m: chosen(records, "antidistillation", m)["real", "real"] for m in ("x", "y")}
    x, y = ([real[m][seed, i] for i in range(3)] for m in ("x", "y"))
    axis.plot(x, y, "k*", markersize=12, label="real points")
    axis.set(xlabel="x", ylabel="learned target", title=f"antidistillation: Neumann, seed {seed}")
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def _draw_distances(axis: Any, records: list[Record]) -> None:
    found = chosen(records, "antidistillation", "distance")
    for method, marker in (("neumann", "o"), ("damping", "s")):
        points = {int(c.split()[-1]): v for (c, m), v in found.items() if m == method}
        means = [np.mean(list(values.values())) for values in points.values()]
        label = {"neumann": "Neumann, K terms", "damping": "damping 1 / (alpha K)"}[method]
        axis.plot(list(points), means, marker=marker, label=label)
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="K",
        ylabel="distance to the nearest solution, relative",
        title=f"antidistillation: {curves.seeds_of(records, 'mean of')}",
    )
    axis.grid(alpha=0.3, which="both")
    axis.legend(loc="lower left")
