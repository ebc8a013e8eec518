"""J on a grid of two outer parameters, and the paths of estimators across it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

import unrollgrad as ug
from experiments._framework import curves, evidence
from experiments._framework.experiment import Claim, Write
from experiments._framework.results import Record, Summary
from unrollgrad.types import Key, UnrolledProblem

GRID = "grid"
"""The label of the grid's lines, in place of an estimator's name."""

NAMES = ("log_theta0", "log_theta1")

FRESH = 64
"""Episodes of every J that is compared. None of them chose anything."""


class Objective(NamedTuple):
    """J of stacked thetas, over the same episodes for each.

    The least of many noisy means is lucky on the episodes that made it the least. Therefore
    ``search`` only chooses; what it chose, and every run, is measured by ``fresh``.

    Attributes:
        search: J over the episodes of the grid.
        fresh: J over ``FRESH`` other episodes.
    """

    search: Callable[[ArrayLike], jax.Array]
    fresh: Callable[[ArrayLike], jax.Array]


def objective(problem: UnrolledProblem, num_episodes: int) -> Objective:
    """J of a problem, over ``num_episodes`` episodes for the grid and ``FRESH`` fresh ones."""
    key_search, key_fresh = (jax.random.key(seed) for seed in (1000, 1001))
    return Objective(
        mean_loss(problem, jax.random.split(key_search, num_episodes)),
        mean_loss(problem, jax.random.split(key_fresh, FRESH)),
    )


def mean_loss(problem: UnrolledProblem, keys: Key) -> Callable[[ArrayLike], jax.Array]:
    """A jitted function ``J(thetas)`` of stacked thetas: the mean over the same episodes for each.

    Args:
        problem: A problem whose theta is one array.
        keys: The episodes' keys.

    Returns:
        The function, from shape (count, *theta.shape) to (count,).
    """

    @jax.jit
    def losses(thetas):
        def all_thetas(key):
            return jax.vmap(lambda theta: ug.episode_loss(problem, key, theta))(thetas)

        return jnp.mean(jax.vmap(all_thetas)(keys), axis=0)

    return losses


def write_grid(objective: Objective, axes: Mapping[str, Sequence[float]], write: Write) -> None:
    """Writes J on a grid, and as ``minimum`` the fresh J of the cell where it is least.

    Args:
        objective: J of stacked thetas.
        axes: The values of each of theta's numbers, by metric; one axis stands for a scalar theta.
        write: Writes a line.
    """
    cells = np.stack(np.meshgrid(*axes.values(), indexing="ij"), axis=-1).reshape(-1, len(axes))
    thetas = np.asarray(cells if len(axes) > 1 else cells[:, 0], np.float32)
    values = np.asarray(objective.search(thetas))
    for i, (cell, value) in enumerate(zip(cells, values, strict=True)):
        write({"estimator": GRID, "step": i, "J": value, **dict(zip(axes, cell, strict=True))})
    best = int(np.nanargmin(values))
    write({"estimator": GRID, "minimum": np.asarray(objective.fresh(thetas[best : best + 1]))[0]})


def logarithms(
    ranges: Sequence[tuple[float, float]], cells: Sequence[int]
) -> dict[str, np.ndarray]:
    """The axes of a grid over the logarithms of two numbers, in equal ratios."""
    values = (np.log(np.geomspace(*ends, n)) for ends, n in zip(ranges, cells, strict=True))
    return dict(zip(NAMES, values, strict=True))


def named(theta: Any) -> dict[str, Any]:
    """Theta's two numbers by metric."""
    return dict(zip(NAMES, theta, strict=True))


def minimum(summary: Summary, **labels: str) -> float | None:
    """The least J on the grid."""
    found = summary.find("minimum", estimator=GRID, **labels)
    return found["mean"] if found else None


def ends_near(summary: Summary, name: str, share: float, source: str, **labels: str) -> list[Claim]:
    """The claim that an estimator's J ends at most a share above the grid's minimum, if it ran."""
    says = f"{name} ends within {share:.0%} of the grid's minimum"
    return _claim(_Ends(summary, name, share, labels), says, source, near=True)


def ends_far(summary: Summary, name: str, share: float, source: str, **labels: str) -> list[Claim]:
    """The claim that an estimator's J ends at least a share above the grid's minimum, if it ran."""
    says = f"{name} ends at least {share:.0%} above the grid's minimum"
    return _claim(_Ends(summary, name, share, labels), says, source, near=False)


class _Ends(NamedTuple):
    """An estimator whose end is compared with a share above the grid's minimum."""

    summary: Summary
    name: str
    share: float
    labels: dict[str, str]


def _claim(ends: _Ends, says: str, source: str, near: bool) -> list[Claim]:
    """A minimum that is measured with every seed has its own error; one that is not, has none."""
    summary, name, share, labels = ends
    least = summary.find("minimum", estimator=GRID, **labels)
    found = summary.find("J", estimator=name, **labels)
    if least is None or found is None:
        return []
    bound = evidence.times(least, 1 + math.copysign(share, least["mean"]))
    if bound["n"] > 1:
        finding = (evidence.less if near else evidence.more)(found, bound)
    else:
        finding = (evidence.below if near else evidence.above)(found, bound["mean"])
    far = (found["mean"] - least["mean"]) / abs(least["mean"])
    text = f"J = {finding.text}; the grid's minimum is {evidence.number(least)}"
    text += f", J {far:+.1%} from it" if math.isfinite(far) else ""
    return [Claim(says, source, text, finding.holds)]


def draw(axis: Any, records: list[Record], names: Sequence[str], label: str) -> None:
    """Draws the grid as colours, and the path of every estimator's first seed from the start.

    Args:
        axis: A matplotlib axis.
        records: The records of one grid.
        names: Names of theta's two numbers, which are drawn without their logarithm.
        label: Label of the colour bar.
    """
    x, y, value = (_lines(records, name) for name in (*NAMES, "J"))
    shape = len(np.unique(x[GRID])), len(np.unique(y[GRID]))
    grid = [np.asarray(found.pop(GRID)).reshape(shape) for found in (x, y, value)]
    mesh = axis.pcolormesh(
        np.exp(grid[0]), np.exp(grid[1]), grid[2], shading="nearest", cmap="Greys", rasterized=True
    )
    for i, (name, style) in enumerate(curves.styles(x).items()):
        across, up = np.exp(x[name]), np.exp(y[name])
        axis.plot(across, up, style.dash, color=style.color, lw=1.2, label=name)
        end = {"ms": 13 - 2 * i, "mfc": "none", "mec": style.color, "mew": 2.0}  # one in another
        axis.plot(across[-1], up[-1], style.marker, **end)
    first = next(iter(x))
    axis.plot(np.exp(x[first][0]), np.exp(y[first][0]), "k*", ms=11, label="start")
    axis.set(xscale="log", yscale="log", xlabel=names[0], ylabel=names[1])
    axis.figure.colorbar(mesh, ax=axis, label=label)


def runs(records: list[Record]) -> list[Record]:
    """The records of the runs, without the grid."""
    return [r for r in records if r.labels["estimator"] != GRID]


def _lines(records: list[Record], metric: str) -> dict[str, np.ndarray]:
    """The metric along the first seed's run, by estimator."""
    found = curves.curves(records, metric)
    return {name: next(iter(runs.values()))[1] for name, runs in found.items()}
