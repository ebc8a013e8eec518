"""The figure of ``bilevel_benchmark``: curves of all solvers, and a heat map of each one's grid."""

import math
from typing import Any

import numpy as np

from experiments._framework.results import Record
from unrollgrad.running import need

STYLES = {
    "soba": ("tab:blue", "o", "-"),
    "soba_constant": ("tab:blue", "s", "--"),
    "ma_soba": ("tab:cyan", "^", "-"),
    "fsla": ("tab:cyan", "v", "--"),
    "saba": ("tab:green", "o", "-"),
    "srba": ("tab:green", "s", "--"),
    "spaba": ("tab:olive", "^", "-"),
    "stocbio": ("tab:red", "o", "-"),
    "amigo": ("tab:red", "s", "--"),
    "bsa": ("tab:orange", "^", "-"),
    "ttsa": ("tab:orange", "v", "--"),
    "mrbo": ("tab:purple", "o", "-"),
    "sustain": ("tab:purple", "s", "--"),
    "f2sa": ("tab:brown", "^", "-"),
    "penalty": ("tab:brown", "v", "--"),
    "bome": ("tab:gray", "o", "-"),
}
"""Colour, marker and line of each solver; a family has a colour."""

LEAST = 1e-15
"""Smaller values, and values below the least h by rounding, are drawn here."""

LABELS = {
    "suboptimality": "h - least h",
    "value": "h (validation loss at the inner minimum)",
    "grad_norm2": "squared norm of h's gradient",
    "direction_error": "error of the mean direction",
    "error": "test error, %",
    "gradients": "gradient-equivalents",
    "cpu_seconds": "CPU seconds",
}

Grid = dict[tuple[float, float], float]


def series(records: list[Record], metric: str) -> dict[str, np.ndarray]:
    """The metric of each solver, shape (seeds, points)."""
    out: dict[str, dict[int, list[float]]] = {}
    for r in records:
        if r.metric == metric:
            out.setdefault(r.labels["estimator"], {}).setdefault(r.seed, []).append(r.value)
    found = {}
    for name, runs in out.items():
        length = min(map(len, runs.values()))
        found[name] = np.array([values[:length] for values in runs.values()])
    return found


def grid_of(records: list[Record]) -> dict[str, Grid]:
    """Each solver's excess at the end of the run of every cell (rate, ratio)."""
    cells: dict[tuple[str, int | None], dict[str, float]] = {}
    for r in records:
        if r.metric.startswith("cell["):
            cells.setdefault((r.labels["estimator"], r.step), {})[r.metric[5:-1]] = r.value
    out: dict[str, Grid] = {}
    for (name, _), cell in cells.items():
        out.setdefault(name, {})[cell["rate"], cell["ratio"]] = cell["excess"]
    return out


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws four panels of curves on the left, and the heat maps on the right."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(15, 8), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    main = "suboptimality" if series(records, "suboptimality") else "value"
    last = "error" if series(records, "error") else "grad_norm2"
    panels = [
        ("gradients", main),
        ("cpu_seconds", main),
        ("gradients", last),
        ("gradients", "direction_error"),
    ]
    axes = left.subplots(2, 2)
    for axis, (x, y) in zip(axes.flat, panels, strict=True):
        _curves(axis, records, x, y)
    handles, names = axes[0, 0].get_legend_handles_labels()
    left.legend(handles, names, loc="outside lower center", ncols=6, fontsize="small")
    seeds = len({r.seed for r in records})
    says = "median and range" if seeds > 1 else "one run"
    task = config["task"] + (", original files" if config.get("data") else "")
    left.suptitle(f"{task}: {says} of {seeds} seed(s), each solver at its best cell")
    start = next(r.value for r in records if r.metric == "start_excess")
    _heat_maps(right, grid_of(records), main, start)
    return figure


def _curves(axis: Any, records: list[Record], x: str, y: str) -> None:
    places, values = series(records, x), series(records, y)
    begun = {"suboptimality": "start_excess", "value": "start_excess", "error": "start_error"}
    start = series(records, begun[y]) if y in begun else {}
    for name, found in values.items():
        color, marker, line = STYLES.get(name, ("k", "x", ":"))
        drawn = 100 * found if y == "error" else np.maximum(found, LEAST)
        at = np.median(places[name], 0)
        middle = np.median(drawn, 0)
        axis.plot(at, middle, line, color=color, marker=marker, ms=4, lw=1.2, label=name)
        if len(found) > 1:
            axis.fill_between(at, drawn.min(0), drawn.max(0), color=color, alpha=0.12, lw=0)
    for name, found in start.items():
        level = (100 if y == "error" else 1) * float(found[0, -1])
        axis.axhline(level, color="k", ls=":", lw=1, label=name)
    axis.set(xscale="log", xlabel=LABELS[x], ylabel=LABELS[y])
    if y in ("suboptimality", "grad_norm2", "direction_error"):
        axis.set_yscale("log")
    axis.xaxis.set_minor_formatter("")
    axis.grid(alpha=0.3)


def _heat_maps(figure: Any, grids: dict[str, Grid], main: str, start: float) -> None:
    """One map per solver, colours in common: the end of a run in every cell, a star at the best."""
    if not grids:
        return
    colors = need("matplotlib.colors", "matplotlib")
    columns = min(4, len(grids))
    axes = figure.subplots(-(-len(grids) // columns), columns, squeeze=False)
    for axis in axes.flat[len(grids) :]:
        axis.remove()
    finite = [max(v, LEAST) for g in grids.values() for v in g.values() if math.isfinite(v)]
    scale = colors.Normalize if main == "value" else colors.LogNorm
    norm = scale(min(finite), max(start, 1.01 * min(finite)))
    image = None
    for i, (axis, (name, grid)) in enumerate(zip(axes.flat, grids.items(), strict=False)):
        rates, ratios = (sorted({pair[k] for pair in grid}) for k in (0, 1))
        cells = np.array([[grid.get((a, b), np.nan) for b in ratios] for a in rates])
        shown = np.where(np.isfinite(cells), np.maximum(cells, LEAST), np.nan)
        axis.set_facecolor("0.75")
        image = axis.pcolormesh(shown, norm=norm, cmap="viridis_r")
        if np.isfinite(cells).any():
            row, column = np.unravel_index(np.nanargmin(shown), shown.shape)
            axis.plot(column + 0.5, row + 0.5, "*", color="w", mec="k", ms=10)
        axis.set_title(name, fontsize=9)
        below, beside = i >= len(grids) - columns, i % columns == 0
        _ticks(axis.xaxis, ratios if below else [], rotation=90)
        _ticks(axis.yaxis, rates if beside else [])
    figure.supxlabel("inner rate / outer rate", fontsize=9)
    figure.supylabel("inner rate", fontsize=9)
    if image is not None:
        figure.colorbar(
            image,
            ax=list(axes.flat[: len(grids)]),
            label=LABELS[main] + " at the end",
            extend="max",
        )
    figure.suptitle("darkest: not below the start; grey: not finite; star: best")


def _ticks(axis: Any, values: list[float], rotation: float = 0) -> None:
    labels = [f"{v:g}" for v in values]
    axis.set_ticks(np.arange(len(values)) + 0.5, labels, fontsize=7, rotation=rotation)
