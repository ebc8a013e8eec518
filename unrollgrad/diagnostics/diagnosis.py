"""The result of a diagnosis: its table, its picture, its files."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from unrollgrad.diagnostics import _table
from unrollgrad.diagnostics.jackknife import leave_one_out, standard_error
from unrollgrad.diagnostics.measurements import Measurements
from unrollgrad.diagnostics.recommend import RankedEstimator, label, what_would_change
from unrollgrad.diagnostics.report import environment, write_json
from unrollgrad.diagnostics.styles import styles
from unrollgrad.diagnostics.windows import of_different_episodes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Details", "Diagnosis", "Sweep"]

OFF_SCALE = 1e4
"""An error so many times as large as the gradient is written at the picture's edge."""

TAIL = 5
"""Losses have to be finite at so many sigma, which a Gaussian number hardly exceeds."""

SMOOTHED = 0.05
"""The change of the gradient by smoothing that the choice of sigma allows."""


class Sweep(NamedTuple):
    """How sigma changes the derivative of J along random directions.

    Attributes:
        sigmas: (S,), ascending.
        slopes: (D, E, S): the derivative along direction d in episode e of that direction; the
            directions and episodes are the same for every sigma.
    """

    sigmas: np.ndarray
    slopes: np.ndarray

    def finite(self) -> np.ndarray:
        """For every sigma, whether all losses were finite."""
        return np.asarray(np.isfinite(self.slopes).all(axis=(0, 1)))

    def suggestion(self) -> float:
        """The largest sigma whose smoothing is not seen.

        Its gradient differs from that at every smaller sigma by less than two standard errors of
        the squared difference, or by less than 5 %. Where losses of larger ones are not finite, it
        is at most a fifth of the largest that is: the directions are signs, but noise is Gaussian.

        Raises:
            ValueError: If losses are not finite whatever sigma.
        """
        finite = np.flatnonzero(self.finite()).tolist()
        if len(finite) == 0:
            raise ValueError(
                "losses are not finite for any sigma from "
                f"{self.sigmas[0]:.3g} to {self.sigmas[-1]:.3g}. Pass a smaller `sigma`, or look "
                "for the step at which the loss leaves its domain."
            )
        if not self.finite().all():
            inside = [i for i in finite if TAIL * self.sigmas[i] <= self.sigmas[finite[-1]]]
            finite = inside or finite[:1]
        for i in finite[::-1]:
            if all(self._same(i, j) for j in finite if j < i):
                break
        return float(self.sigmas[i])

    def _same(self, i: int, j: int) -> bool:
        large, small = self.slopes[..., i], self.slopes[..., j]
        change = leave_one_out(of_different_episodes(large - small, large - small))
        norm = float(np.mean(of_different_episodes(large, large)))
        seen = max(2 * standard_error(change), SMOOTHED**2 * max(norm, 0.0))
        return bool(change[0] <= seen)


class Details(NamedTuple):
    """What was measured besides that which decides.

    Attributes:
        sigma: The sigma of all measurements.
        sweep: The sweep that chose it; a single value if it was given.
        exponents: The first Lyapunov exponent of some episodes; empty if steps have no derivative.
        nonfinite_pairs: The share of episodes in which a pair's loss was not finite.
        loss: J at theta, from some episodes.
        share: Seconds of measuring (not compiling) over those of 100 updates by whole episodes.
        seconds: Seconds in all.
    """

    sigma: float
    sweep: Sweep
    exponents: np.ndarray
    nonfinite_pairs: float
    loss: float
    share: float
    seconds: float


class Diagnosis(NamedTuple):
    """What is wrong with an unroll, and which estimator to use.

    Attributes:
        measurements: What was measured.
        ranking: The estimators, the best first, those that are not admissible last.
    """

    measurements: Measurements
    ranking: list[RankedEstimator]

    @property
    def recommendation(self) -> RankedEstimator:
        """The first row of the ranking."""
        return self.ranking[0]

    def verdict(self) -> list[str]:
        """The recommendation, ties, what would change it, and what else was seen, as sentences."""
        m, first, details = self.measurements, self.recommendation, self.measurements.details
        lines = [
            f"Use {label(first)} with sigma={details.sigma:.2g}: {first.reason}."
            if first.name not in ("bptt", "tbptt", "forward_mode", "dodge")
            else f"Use {label(first)}: {first.reason}."
        ]
        tied = [label(r) for r in _best_of_each(self.ranking)[1:] if r.tied]
        if tied:
            lines.append(
                f"Tied within two standard errors: {', '.join(tied)}. ug.diagnostics.compare "
                "measures them one by one."
            )
        lines += [
            f"Signal equals noise with {_number(first.workers)} workers (you have {m.num_workers})."
        ]
        lines += what_would_change(m, self.ranking)
        if m.obstacle:
            lines.append(f"Backpropagation: {m.obstacle}.")
        if details.nonfinite_pairs:
            lines.append(f"{details.nonfinite_pairs:.0%} of the episodes had non-finite losses.")
        if len(details.exponents):
            mean = float(np.mean(details.exponents))
            lines.append(
                f"Small changes of the state grow by exp({mean * m.horizon:.2g}) over an episode "
                f"({mean:.2g} per step)."
            )
        return lines

    def table(self) -> None:
        """Prints the ranking, 100 columns wide, and the verdict below it.

        Of ``gpes`` the best noise period is shown. Needs rich
        (``pip install "unrollgrad[experiments]"``).
        """
        m, details = self.measurements, self.measurements.details
        rows = [
            [
                label(row) + (" *" if row.tied and row is not self.ranking[0] else ""),
                f"{row.nmse:.2g} ± {row.nmse_se:.1g}" if row.admissible else "-",
                _number(row.workers) if row.admissible else "-",
                f"{1e3 * row.seconds:.2g}",
                "?" if row.bytes is None else _table.readable_bytes(row.bytes),
                row.reason,
            ]
            for row in _best_of_each(self.ranking)
        ]
        _table.print_table(
            f"{m.num_workers} workers, T = {m.horizon}, K = {m.truncation}, sigma = "
            f"{details.sigma:.2g}, P = {m.windows.dim}, J = {details.loss:.4g}",
            ["estimator", "error", "workers", "ms", "memory", "why"],
            rows,
            [
                "error: predicted mean squared error / |g|² at equal cost, ± its standard error "
                "(*: tied)",
                "workers: at which signal equals noise; ms and memory: of one worker's episode",
                *self.verdict(),
            ],
        )

    def plot(self) -> "Figure":
        """Draws the errors, the sweep of sigma, and the variance against the noise period.

        Returns:
            A matplotlib figure. Needs matplotlib (``pip install "unrollgrad[experiments]"``).
        """
        figure = _table.figure(14, 4.8)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
        _draw_errors(left, self)
        _draw_sweep(middle, self)
        _draw_periods(right, self)
        figure.supxlabel("\n".join(self.verdict()[:3]), fontsize=9, x=0.01, ha="left")
        return figure

    def save(self, folder: str | Path) -> Path:
        """Writes ``ranking.csv``, ``summary.json`` and ``figure.png``.

        Returns:
            The folder, which is made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "ranking.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(RankedEstimator._fields)
            writer.writerows(self.ranking)
        m = self.measurements
        details = m.details._asdict()
        del details["sweep"]
        summary = {
            "ranking": [row._asdict() for row in self.ranking],
            "verdict": self.verdict(),
            "cosine": m.windows.cosine(),
            "details": details | {"exponents": m.details.exponents.tolist()},
            "sigmas": m.details.sweep.sigmas.tolist(),
            "cost": m.cost._asdict(),
            "settings": {
                "horizon": m.horizon,
                "truncation": m.truncation,
                "num_workers": m.num_workers,
                "memory_limit": m.memory_limit,
            },
            "environment": environment(),
        }
        write_json(folder / "summary.json", summary)
        self.plot().savefig(folder / "figure.png", dpi=150)
        return folder


def _best_of_each(ranking: list[RankedEstimator]) -> list[RankedEstimator]:
    """The first row of every name."""
    first: dict[str, RankedEstimator] = {}
    for row in ranking:
        first.setdefault(row.name, row)
    return list(first.values())


def _number(x: float) -> str:
    return f"{max(x, 0):.2g}" if x < 100 else f"{x:.0f}" if x < 1e5 else f"{x:.0e}"


def _draw_errors(axis: "Axes", diagnosis: Diagnosis) -> None:
    """One line for each estimator, the best on top."""
    rows = _best_of_each(diagnosis.ranking)
    look = styles([row.name for row in rows])
    said = ["best", *("tied" if row.tied else "" for row in rows[1:])]
    names = [f"{label(r)} ({s})" if s else label(r) for r, s in zip(rows, said, strict=True)]
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    shown = [row.nmse for row in rows if row.admissible and row.nmse > 0]
    low = min(shown) / 3 if shown else 0.1
    high = min(max([*shown, 1.0]) * 5, OFF_SCALE * max(1.0, low))
    for i, row in enumerate(rows):
        color, marker, _ = look[row.name]
        if row.admissible and row.nmse < high:
            x = max(row.nmse, low)
            error = [[min(row.nmse_se, 0.9 * x)], [row.nmse_se]]
            axis.errorbar(x, i, xerr=error, color=color, marker=marker, capsize=3)
            continue
        text = f"{row.nmse:.0e} →" if row.admissible else row.reason
        place = (high, i) if row.admissible else (low, i)
        offset, side = ((-4, 0), "right") if row.admissible else ((4, 0), "left")
        axis.annotate(text, place, offset, textcoords="offset points", va="center", ha=side)
        axis.texts[-1].set(color=color if row.admissible else "0.4", fontsize=8)
    axis.axvline(1, color="grey", lw=0.8)
    title = f"predicted error at the cost of {diagnosis.measurements.num_workers} workers"
    axis.set(xscale="log", xlim=(low / 1.5, high), title=title)
    axis.set_xlabel("mean squared error / |g|² (1: as large as the gradient)")
    axis.grid(alpha=0.3)


def _draw_sweep(axis: "Axes", diagnosis: Diagnosis) -> None:
    """The size of a slope, and of its mean over episodes, against sigma."""
    sweep, sigma = diagnosis.measurements.details.sweep, diagnosis.measurements.details.sigma
    finite = sweep.finite()
    slopes, sigmas = sweep.slopes[..., finite], sweep.sigmas[finite]
    size = np.sqrt(np.mean(slopes**2, axis=(0, 1)))
    shared = np.mean(of_different_episodes(slopes, slopes), axis=0)
    axis.plot(sigmas, size, "o-", color="C0", label="of one episode")
    good = shared > 0
    axis.plot(sigmas[good], np.sqrt(shared[good]), "s--", color="C1", label="common to episodes")
    for s in sweep.sigmas[~finite]:
        axis.axvline(s, color="C3", ls=":", lw=1.5)
    axis.axvline(sigma, color="k", lw=1)
    axis.annotate(f" {sigma:.2g}", (sigma, 0.02), xycoords=("data", "axes fraction"), fontsize=9)
    lost = ", dotted: not finite" if not finite.all() else ""
    axis.set_xlim(sweep.sigmas.min() / 1.5, sweep.sigmas.max() * 1.5)  # there may be one sigma
    axis.set(xscale="log", yscale="log", xlabel=f"sigma (line: used{lost})")
    axis.set_ylabel("slope of J along a direction (rms)")
    axis.set_title("does sigma change the gradient?")
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.3)


def _draw_periods(axis: "Axes", diagnosis: Diagnosis) -> None:
    """The variance of ``gpes`` over ``es_single``'s, against the number of noise periods."""
    m = diagnosis.measurements
    stretches = m.windows.influence.shape[-1]
    one = m.windows.variance(None)
    periods = {-(-stretches // r): r for r in range(stretches, 0, -1)}
    found = [(number, m.windows.variance(r) / one) for number, r in periods.items()]
    if m.windows.fresh is not None:
        found.append((m.horizon // m.truncation, m.windows.variance(0) / one))
    number, values = zip(*found, strict=True)
    ratio = [v[0] for v in values]
    axis.errorbar(number, ratio, [standard_error(v) for v in values], marker="o", capsize=3)
    axis.axhline(1, color="grey", lw=0.8)
    cosine, se = m.windows.cosine()
    axis.set(xlabel="noise periods in an episode\n(1: es_single; most: pes)", yscale="log")
    axis.set_ylabel("variance / variance of es_single")
    axis.set_title(f"do windows agree? cosine {cosine:.2f} ± {se:.2f}")
    axis.grid(alpha=0.3)
