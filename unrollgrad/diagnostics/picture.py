"""The picture of a comparison: how wrong, how noisy and how costly each estimator is."""

import functools
import io
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from unrollgrad._core import optional_packages
from unrollgrad.diagnostics.statistics import Row
from unrollgrad.diagnostics.styles import Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

OFF_SCALE = 1e4
"""A value so many times the median one is written at the edge: it would flatten all the others."""

NOTES = (
    "Left: filled marker: bias ± standard error; hollow marker with an arrow: no bias was seen, "
    "upper limit. Middle: variance of the mean of many updates, per episode.\n"
    "Right: from the measured point to 1000 times as many workers; dotted where a bias too small "
    "for this measurement could dominate. |g|: norm of the reference."
)


class _Line(NamedTuple):
    """One estimator in one panel."""

    name: str
    style: Style
    x: np.ndarray
    y: np.ndarray
    error: np.ndarray  # of y; empty if it has none
    known: int  # the points from here on are dotted; the line is whole if it is their number
    otherwise: str  # said in place of a line without points


def draw(groups: dict[str, list[Row]]) -> "Figure":
    """Draws rows of ``compare``, one line of panels for each named group."""
    figure = optional_packages.need("matplotlib.figure", "matplotlib").Figure(
        figsize=(13.5, 1.0 + 4.0 * max(len(groups), 1)), layout="constrained"
    )
    names = dict.fromkeys(row["name"] for rows in groups.values() for row in rows)
    look = styles(names)
    lines = figure.subplots(max(len(groups), 1), 3, squeeze=False, width_ratios=(1, 1.1, 1.1))
    for (title, rows), axes in zip(groups.items(), lines, strict=True):
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # a reference of zero
            _bias(axes[0], rows, look)
            _variance_of_means(axes[1], rows, look)
            _cost(axes[2], rows, look)
        for axis in axes:
            _plain_ticks(axis)
        size = f"|g| = {rows[0]['reference_norm']:.2g}" if rows else ""
        head = f"{title}:  {size}" if title else size
        axes[0].annotate(head, (0, 1.1), xycoords="axes fraction", fontsize=12, weight="bold")
    figure.supxlabel(NOTES, fontsize=9, x=0.01, ha="left")
    figure._repr_png_ = functools.partial(_png, figure)  # so that a notebook shows it
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    return buffer.getvalue()


def _bias(axis: "Axes", rows: list[Row], look: dict[str, Style]) -> None:
    """One line for each estimator, so that no marker hides another."""
    axis.set(title="how wrong: bias", xlabel="bias / |g|")
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(alpha=0.3)
    columns = [[row[name] for row in rows] for name in ("reference_norm", "bias", "bias_se")]
    norm, bias, error = np.array(columns, float).reshape(3, -1)
    bias, error = bias / norm, error / norm
    seen = bias > 3 * error
    shown = np.where(seen, bias, bias + 2 * error)
    limits = _limits(np.concatenate([shown, bias[seen] - error[seen]]), below=0.25)
    if limits is None:
        axis.text(0.5, 0.5, "no finite bias", ha="center", transform=axis.transAxes)
        return
    low, high = limits
    axis.set(xscale="log", xlim=limits)
    if low < 1 < high:
        axis.axvline(1, color="grey", lw=0.8)
    for i, row in enumerate(rows):
        color, marker, _ = look[row["name"]]
        style = {"marker": marker, "color": color, "ms": 8, "mew": 1.5}
        if not np.isfinite(shown[i]):
            axis.annotate("not finite", (high, i), (-4, 0), textcoords="offset points", ha="right")
        elif shown[i] > high:
            there = {"ha": "right", "va": "center", "color": color}
            text = f"{shown[i]:.0e} →" if seen[i] else f"< {shown[i]:.0e} →"
            axis.annotate(text, (high, i), (-4, 0), textcoords="offset points", **there)
        elif seen[i]:
            axis.errorbar(shown[i], i, xerr=error[i], capsize=3, **style)
        elif shown[i] > 0:
            _arrow(axis, shown[i], i, color)
            axis.plot(shown[i], i, mfc="white", **style)
        else:
            axis.annotate(
                "0", (low, i), (4, 0), textcoords="offset points", va="center", color=color
            )


def _arrow(axis: "Axes", x: float, y: float, color: str) -> None:
    """An arrow to the left from a marker: the value is somewhere below."""
    tail = {"arrowstyle": "<-", "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 4}
    axis.annotate("", (x, y), (-26, 0), "data", "offset points", arrowprops=tail)


def _variance_of_means(axis: "Axes", rows: list[Row], look: dict[str, Style]) -> None:
    axis.set(
        title="how noisy: variance per episode spent",
        xscale="log",
        xlabel="episodes averaged, U/n",
        ylabel="variance of the mean of U updates × U/n / |g|²",
    )
    lines = []
    for row in rows:
        u, values = np.array(list(row["variance_of_mean"].items()), float).reshape(-1, 2).T
        values = values / np.square(row["reference_norm"])
        error = np.array(list(row["variance_of_mean_se"].values()), float)
        error = np.minimum(error / np.square(row["reference_norm"]), 0.9 * values)
        good = _positive(values)
        x = u[good] / row["num_windows"]
        style = look[row["name"]]
        said = "not finite" if not np.isfinite(values).all() else "0"
        x = x * 1.07 ** (len(lines) - (len(rows) - 1) / 2)  # equal values do not hide one another
        lines.append(_Line(row["name"], style, x, values[good], error[good], len(x), said))
    _draw_lines(axis, lines, slice(None))


def _cost(axis: "Axes", rows: list[Row], look: dict[str, Style]) -> None:
    axis.set(
        title="at what cost: error as workers are added",
        xlabel="inner steps per estimate",
        ylabel="mean squared error / |g|² (NMSE)",
        xscale="log",
    )
    more, lines = np.geomspace(1, 1000, 60), []
    for row in rows:
        norm = np.float64(row["reference_norm"])
        seen = row["bias"] > 3 * row["bias_se"]
        bias = row["bias"] / norm if seen else 0.0
        hidden = 0.0 if seen else (row["bias"] + 2 * row["bias_se"]) / norm
        noise = row["variance"] / norm**2 / more
        error = bias**2 + noise
        known = max(int(np.sum(noise >= hidden**2)), 1)
        shown = slice(None) if _positive(error).all() else slice(0, 0)
        x = row["inner_steps"] * more[shown]
        said = "not finite" if not np.isfinite(error).all() else "0"
        lines.append(
            _Line(row["name"], look[row["name"]], x, error[shown], np.zeros(0), known, said)
        )
    _draw_lines(axis, lines, slice(0, 1))


def _plain_ticks(axis: "Axes") -> None:
    """Labels powers of ten, and 2 and 5 times them on a short axis: more would overlap."""
    ticker = optional_packages.need("matplotlib.ticker", "matplotlib")
    for one in (axis.xaxis, axis.yaxis):
        if one.get_scale() == "log":
            low, high = one.get_view_interval()
            named = (2, 5) if high < 50 * low else ()

            def label(x: float, _: int, named: tuple[int, ...] = named) -> str:
                return f"{x:g}" if round(x / 10 ** np.floor(np.log10(x))) in named else ""

            one.set_minor_formatter(ticker.FuncFormatter(label))


def _draw_lines(axis: "Axes", lines: list[_Line], marked: slice) -> None:
    """Draws the lines, with markers on these points, and each line's name at its right end."""
    axis.grid(alpha=0.3)
    missing = [line for line in lines if not len(line.x)]
    lines = [line for line in lines if len(line.x)]
    # The bars may reach below the values.
    reached = [line.y - line.error if len(line.error) else line.y for line in lines]
    limits = _limits(np.concatenate([*[line.y for line in lines], *reached, np.zeros(0)]))
    if limits is None:
        axis.text(0.5, 0.5, "nothing finite to draw", ha="center", transform=axis.transAxes)
        return
    across = _limits(np.concatenate([line.x for line in lines]))
    axis.set(yscale="log", ylim=limits, xlim=across)
    for line in lines:
        color, marker, dash = line.style
        x = line.x
        solid, dotted = slice(0, line.known), slice(max(line.known - 1, 0), None)
        axis.plot(x[solid], line.y[solid], dash, color=color, lw=1.5)
        if line.known < len(x):
            axis.plot(x[dotted], line.y[dotted], ":", color=color, lw=1.5)
        error = line.error if len(line.error) else None
        bars = None if error is None else error[marked]
        style = {"fmt": "none", "color": color, "capsize": 3}
        axis.errorbar(x[marked], line.y[marked], bars, **style)
        axis.plot(x[marked], line.y[marked], ls="", marker=marker, color=color, ms=7, mec="white")
    _name_ends(axis, lines, missing)


def _name_ends(axis: "Axes", lines: list[_Line], missing: list[_Line]) -> None:
    """Writes the names to the right of the axis, apart from one another, each tied to its line.

    The names of lines that have no positive point are below them.
    """
    low, high = np.log(axis.get_ylim())
    ends = [float((np.log(line.y[-1]) - low) / (high - low)) for line in lines]
    places = _apart([*ends, *[0.0] * len(missing)], 0.062)
    for line, place in zip(missing, places[len(lines) :], strict=True):
        text = f"{line.name}: {line.otherwise}"
        axis.text(1.06, place, text, color=line.style.color, va="center", transform=axis.transAxes)
    for line, end, place in zip(lines, ends, places, strict=False):
        text = line.name if end <= 1 else f"{line.name} ↑ {line.y[-1]:.0e}"
        tie = {"arrowstyle": "-", "color": "0.6", "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
        axis.annotate(
            text,
            (line.x[-1], min(line.y[-1], axis.get_ylim()[1])),
            (1.06, place),
            "data",
            "axes fraction",
            color=line.style.color,
            va="center",
            arrowprops=tie,
            annotation_clip=False,
        )


def _apart(places: list[float], gap: float) -> list[float]:
    """Places near these, in the same order, in 0 to 1 and at least ``gap`` apart if they fit."""
    order = np.argsort(places, kind="stable")
    x = np.clip(np.array(places, float)[order], 0, 1)
    # Neighbours that are too close become a block with the mean of their places.
    blocks: list[list[float]] = []  # sum of (place - offset), number
    for i, value in enumerate(x):
        blocks.append([value - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, number = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += number
    flat = np.concatenate([[total / number] * int(number) for total, number in blocks])
    top = 1 - gap * (len(x) - 1)
    out = np.empty(len(x))
    out[order] = np.clip(flat, 0, max(top, 0)) + gap * np.arange(len(x))
    return out.tolist()


def _limits(values: np.ndarray, below: float = 0.06) -> tuple[float, float] | None:
    """Limits of a logarithmic axis, more than a decade apart; None if no value is positive.

    Values beyond ``OFF_SCALE`` times the median are left out. The room at the lower end is the
    power ``below`` of the values' range, so that an arrow fits in.
    """
    good = np.sort(values[_positive(values)])
    if not len(good):
        return None
    good = good[good <= OFF_SCALE * good[(len(good) - 1) // 2]]
    low, high = good[0], good[-1]
    span = high / low
    low, high = low / max(span**below, 1.5), high * max(span**0.06, 1.5)
    short = max(np.sqrt(11 * low / high), 1.0)
    return float(low / short), float(high * short)


def _positive(x: np.ndarray) -> np.ndarray:
    return (x > 0) & np.isfinite(x)
