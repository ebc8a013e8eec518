"""The picture of a run: the loss of every step, its mean over episodes, and the evaluations."""

import functools
import io
from typing import TYPE_CHECKING

import numpy as np

from unrollgrad._core import optional_packages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[np.ndarray, np.ndarray]


def draw(losses: np.ndarray, mean: Curve | None, evaluations: dict[str, Curve]) -> "Figure":
    """Draws the losses, their mean over whole episodes if there is one, and scalar evaluations."""
    figure = optional_packages.need("matplotlib.figure", "matplotlib").Figure(
        figsize=(6.5, 4) if not evaluations else (11, 4), layout="constrained"
    )
    axes = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    thick = mean is not None and len(mean[0]) > 0
    raw = {"color": "grey", "lw": 0.8, "alpha": 0.7} if thick else {"color": "C0"}
    axes[0].plot(1 + np.arange(len(losses)), losses, label="each step", **raw)
    if thick:
        axes[0].plot(*mean, color="C0", lw=2, label="mean over the last whole episode")
    axes[0].set(xlabel="outer steps", ylabel="loss")
    for name, (steps, values) in evaluations.items():
        axes[1].plot(steps, values, marker=".", label=name)
    if evaluations:
        axes[1].set(xlabel="outer steps", ylabel="evaluations")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure._repr_png_ = functools.partial(_png, figure)  # so that a notebook shows it
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    return buffer.getvalue()
