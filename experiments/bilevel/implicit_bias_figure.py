"""The figure of ``implicit_bias``: the weights' plane, and outer losses."""

from typing import Any

import numpy as np

from experiments._framework.results import Record
from unrollgrad.running import need

COLORS = {"cold": "C0", "warm": "C3", "re-trained": "C1"}
MARKERS = {"cold": "o", "warm": "s", "re-trained": "^"}
FITTED = (2.0, 0.0)
"""The weights that fit the real points."""

Path = dict[str, np.ndarray]


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws the paths of the weights, the loss along them, and the ends of all methods."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(13, 4.6), layout="constrained")
    plane, losses, ends = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    found = paths(records)
    _draw_plane(plane, found)
    _draw_losses(losses, found)
    _draw_ends(ends, found)
    return figure


def paths(records: list[Record]) -> dict[tuple[str, str], Path]:
    """The numbers along each run of the first seed, by method and start."""
    seed = records[0].seed
    lists: dict[tuple[str, str], dict[str, list[float]]] = {}
    for r in records:
        if r.seed == seed:
            run = lists.setdefault((r.labels["method"], r.labels["start"]), {})
            run.setdefault(r.metric, []).append(r.value)
            if r.metric == "loss":
                run.setdefault("step", []).append(np.nan if r.step is None else r.step)
    return {key: {k: np.array(v) for k, v in run.items()} for key, run in lists.items()}


def _draw_plane(axis: Any, found: dict[tuple[str, str], Path]) -> None:
    around = np.linspace(0, 2 * np.pi, 200)
    axis.plot(np.cos(around), np.sin(around), color="0.7", lw=1, label="all cold solutions")
    first = next(start for _, start in found)
    for (method, start), run in found.items():
        if method not in COLORS:
            continue
        color, marker = COLORS[method], MARKERS[method]
        main = start == first
        thick, faint = (2.0, 1.0) if main else (0.8, 0.45)
        if method != "re-trained":
            label = f"{method}, theta from {start}" if main else None
            axis.plot(run["w1"], run["w2"], color=color, lw=thick, alpha=faint, label=label)
        label = f"{method}: end" if main else None
        last = [run[name][-1:] for name in ("w1", "w2")]
        axis.plot(*last, marker, color=color, ms=8, mfc="none", alpha=faint, label=label, ls="")
    _draw_line(axis, found.get(("warm", first)))
    axis.plot(*FITTED, "k*", ms=12, label="fits the real points", ls="")
    axis.set(xlabel="first weight", ylabel="second weight", title="the inner weights' plane")
    axis.set(xlim=(-1.3, 2.6), ylim=(-1.75, 2.7), aspect="equal")
    axis.legend(fontsize=7, loc="upper center", ncols=2)


def _draw_line(axis: Any, run: Path | None) -> None:
    """The inner problem's minima at the end of the warm start."""
    if run is None or not np.isfinite(run["theta"][-1]):
        return
    x = np.array([np.cos(run["theta"][-1]), np.sin(run["theta"][-1])])
    across = np.array([-x[1], x[0]])
    ends = x + np.array([[-2.4], [1.2]]) * across
    axis.plot(*ends.T, "k--", lw=0.8, label="inner minima, warm's end")


def _draw_losses(axis: Any, found: dict[tuple[str, str], Path]) -> None:
    first = next(start for _, start in found)
    for method in ("cold", "warm"):
        for (name, start), run in found.items():
            if name == method:
                main = start == first
                label = f"{method}, theta from {start}" if main else None
                look = {"lw": 2.0 if main else 0.8, "alpha": 1.0 if main else 0.45}
                axis.plot(run["step"], run["loss"], color=COLORS[method], label=label, **look)
    again = found.get(("re-trained", first))
    if again is not None:
        label = "re-trained with warm's last theta"
        axis.axhline(again["loss"][-1], color=COLORS["re-trained"], ls=":", label=label)
    axis.set(yscale="log", xlabel="outer steps", ylabel="outer loss")
    axis.set(title="along the way; thin: from other angles")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left")


def _draw_ends(axis: Any, found: dict[tuple[str, str], Path]) -> None:
    marks = {**MARKERS, "cold, implicit": "v", "cold, few steps": "d"}
    marks.update({"cold, penalty": "+", "warm, penalty": "x"})
    for i, (method, marker) in enumerate(marks.items()):
        runs = [(float(start), run["loss"][-1]) for (m, start), run in found.items() if m == method]
        color = COLORS.get(method, f"C{i + 4}")
        if runs:
            axis.plot(*zip(*sorted(runs), strict=True), marker, color=color, label=method, ls="")
    at, limit = _closed()
    axis.plot(at, limit, color=COLORS["warm"], lw=0.8, label="warm, closed form")
    axis.set(xlabel="theta at the beginning", ylabel="outer loss at the end", ylim=(-0.05, 1.25))
    axis.set(title="the end, by the beginning")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, ncols=2, loc="upper right")


def _closed() -> tuple[np.ndarray, np.ndarray]:
    alpha = np.arccos(1 / FITTED[0])
    at = np.linspace(-alpha, alpha, 201)
    return at, (alpha + np.abs(at) - np.tan(alpha)) ** 2 / 4
