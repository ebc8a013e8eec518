"""The figure of ``planar_distillation``."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments._framework import curves
from experiments._framework.results import Record
from unrollgrad.running import need

CELLS = 41
"""Cells along each side of the picture of what a network says."""
SIDE = 2.0
"""The plane is drawn from -SIDE to SIDE."""
COLORS = ("C0", "C3")
"""Of the disc and of the ring."""


def plane() -> Any:
    """The centres of the cells, (CELLS ** 2, 2), the second coordinate changing faster."""
    line = jnp.linspace(-SIDE, SIDE, CELLS)
    return jnp.stack([x.ravel() for x in jnp.meshgrid(line, line, indexing="ij")], axis=1)


def draw(records: list[Record], config: dict[str, Any]) -> Any:
    """Draws both paths over what the networks say (first seed), and the accuracies (all seeds)."""
    figure = need("matplotlib.figure", "matplotlib").Figure(figsize=(11, 7.6), layout="constrained")
    axes = figure.subplots(2, 3)
    panels = [
        ("warm", "at the end", "warm start: its network"),
        ("warm", "trained anew", "trained anew on warm's last points"),
        ("warm", "trained anew, best", "... on the path's best points"),
        ("cold", "at the end", "cold start: its network"),
    ]
    for axis, (start, network, title) in zip(axes.flat, panels, strict=False):
        _panel(axis, records, start, network, title)
    for axis, metric in zip(axes.flat[len(panels) :], ("accuracy", "loss"), strict=True):
        _curves(axis, records, metric)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def values(records: list[Record], metric: str, start: str, network: str) -> dict[int, np.ndarray]:
    """The metric along the steps, by seed."""
    found: dict[int, list[float]] = {}
    for r in records:
        if r.metric == metric and (r.labels["start"], r.labels["network"]) == (start, network):
            found.setdefault(r.seed, []).append(r.value)
    return {seed: np.array(line) for seed, line in found.items()}


def _panel(axis: Any, records: list[Record], start: str, network: str, title: str) -> None:
    """One network's outputs, the data, and the path of both points."""
    seed = records[0].seed
    outputs = values(records, "output", start, network).get(seed)
    if outputs is not None and len(outputs) == CELLS**2:
        line = np.linspace(-SIDE, SIDE, CELLS)
        says = outputs.reshape(CELLS, CELLS).T
        limit = np.abs(says).max()
        axis.contourf(line, line, says, 20, cmap="coolwarm", vmin=-limit, vmax=limit, alpha=0.5)
        axis.contour(line, line, says, [0.0], colors="black", linewidths=1.2)
    x, y, label = (
        values(records, m, "data", "data").get(seed, np.zeros(0)) for m in ("x", "y", "target")
    )
    for k, name in enumerate(("disc", "ring")):
        here = (label > 0) == k
        axis.plot(x[here], y[here], ".", color=COLORS[k], ms=3, label=f"data: {name}")
        path = [values(records, f"{d}{k}", start, "path").get(seed, np.zeros(0)) for d in "xy"]
        axis.plot(*path, "-", color=COLORS[k], lw=0.9, label=f"path of the {name}'s point")
        axis.plot(
            *(line[-1:] for line in path),
            "*",
            color=COLORS[k],
            mec="black",
            ms=13,
            label=f"its end ({name})",
        )
    axis.set(xlim=(-SIDE, SIDE), ylim=(-SIDE, SIDE), title=title, aspect="equal")


def _curves(axis: Any, records: list[Record], metric: str) -> None:
    """The metric along the outer steps: the mean over seeds, in a band of one standard error."""
    steps = sorted({r.step for r in records if r.metric == "accuracy" and r.step is not None})
    for i, start in enumerate(("warm", "cold")):
        lines = np.array(list(values(records, metric, start, "path").values()))
        mean, color = lines.mean(axis=0), ("C1", "C2")[i]
        axis.plot(steps, mean, color=color, label=f"{start} start")
        if len(lines) > 1:
            se = lines.std(axis=0, ddof=1) / np.sqrt(len(lines))
            axis.fill_between(steps, mean - se, mean + se, color=color, alpha=0.2, lw=0)
    if metric == "accuracy":
        for j, network in enumerate(("trained anew", "trained anew, best")):
            ends = [v[-1] for v in values(records, "accuracy_at_end", "warm", network).values()]
            label = "warm's points, " + network
            axis.axhline(np.mean(ends), color="C1", ls=("--", ":")[j], label=label)
        axis.axhline(0.5, color="black", lw=0.8, label="chance")
    title = f"{metric}, {curves.seeds_of(records)}"
    axis.set(xlabel="outer updates", ylabel=f"{metric} on the data", title=title)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
