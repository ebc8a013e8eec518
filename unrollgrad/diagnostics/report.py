"""The result of ``compare``, and its table, picture and files."""

import csv
import importlib
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from unrollgrad._core import html, optional_packages
from unrollgrad.diagnostics.picture import draw
from unrollgrad.diagnostics.statistics import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "COLUMNS",
    "Comparison",
    "at_equal_steps",
    "cell",
    "draw",
    "environment",
    "line",
    "long_run",
    "metrics",
    "print_tables",
    "row_of",
    "write_json",
]

COLUMNS = {
    "name": ("estimator", "at the given theta; g is the mean of the reference"),
    "bias": (
        "bias",
        "norm of (mean - g) / |g|, ± standard error; < x: none was seen, x is the upper limit",
    ),
    "variance": ("variance", "trace of the covariance of a sample (one episode) / |g|²"),
    "long_run": ("long run", "the same per episode if 20 episodes are averaged"),
    "norm_ratio": ("norm", "norm of the mean / |g|"),
    "cosine": ("cosine", "of the angle between the mean and g"),
    "snr": ("SNR", "norm of the mean / standard deviation of a sample"),
    "nmse": ("NMSE", "bias² + variance: the mean squared error of a sample / |g|²"),
    "nmse_equal_steps": (
        "at equal steps",
        "the NMSE with as many more workers as cost the same as the costliest row",
    ),
    "inner_steps": ("steps", "inner steps of a sample"),
    "seconds": ("s", "seconds of a sample, without compilation"),
    "num_nonfinite": (
        "left out",
        "windows with a loss that is not finite, or workers that were left out for it",
    ),
}
"""The table's columns: a row's key, the heading, and what it means."""


class Comparison(NamedTuple):
    """Estimators side by side.

    Attributes:
        rows: One dict per estimator; see ``compare``.
        samples: The raw samples by name, float64 of shape (num_samples, P): the leaves of theta,
            flattened, in order.
        reference: Samples of the reference, (m, P); m = 1 if it is exact.
        settings: The settings: num_samples, num_chains, matmul_precision, devices.
    """

    rows: list[Row]
    samples: dict[str, np.ndarray]
    reference: np.ndarray
    settings: dict[str, int | str | None]

    def __repr__(self):
        top = f"Comparison, {self.settings.get('num_samples')} samples each, in units of |g|:"
        return "\n  ".join([top, *map(line, self.rows)])

    def _repr_html_(self):
        rows = _complete(self.rows)
        columns = _columns(rows)
        lines = [[cell(column, row) for column in columns] for row in rows]
        return html.table(lines, list(columns.values()), caption=_size(rows))

    def table(self) -> None:
        """Prints the rows and, below them, what each column means.

        Bias and variance are in units of the reference's norm |g|, which the title says. Needs rich
        (``pip install "unrollgrad[experiments]"``).
        """
        print_tables({"": self.rows})

    def plot(self) -> "Figure":
        """Draws the bias, the variance against U, and the error against its cost.

        Everything is in units of the reference's norm |g|. Left: the bias with its standard error;
        a hollow marker with an arrow is an upper limit, drawn if no bias was seen. Middle:
        ``variance_of_mean``, the variance per episode spent when U consecutive updates are
        averaged. Right: the squared error against inner steps, from the measured number of workers
        (the marker) to 1000 times as many; a vertical line compares estimators at equal inner
        steps. It is dotted where a bias too small for this measurement could dominate.

        Returns:
            A matplotlib figure. Needs matplotlib (``pip install "unrollgrad[experiments]"``).
        """
        return draw({"": self.rows})

    def save(self, folder: str | Path) -> Path:
        """Writes ``metrics.csv``, ``samples.npz``, ``summary.json`` and ``figure.png``.

        The CSV has one line per estimator and metric; the raw samples are an array
        (estimators, num_samples, P) beside the estimators' names.

        Returns:
            The folder, which is made if it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["estimator", "metric", "value"])
            for row in self.rows:
                writer.writerows([row["name"], *item] for item in metrics(row).items())
        names, samples = list(self.samples), list(self.samples.values())
        np.savez_compressed(folder / "samples.npz", estimators=names, samples=samples)
        summary = {
            "rows": self.rows,
            "settings": self.settings,
            "reference": self.reference.mean(axis=0).tolist(),
            "environment": environment(),
        }
        write_json(folder / "summary.json", summary)
        self.plot().savefig(folder / "figure.png", dpi=150)
        return folder


def metrics(row: Row) -> dict[str, float]:
    """A row's numbers by metric; ``variance_of_mean`` at U = 100 as ``variance_of_mean[100]``."""
    flat = {}
    for metric, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{metric}[{u}]": x for u, x in value.items()}
        elif metric != "name":
            flat[metric] = value
    return flat


def row_of(name: str, flat: dict[str, float]) -> Row:
    """The inverse of ``metrics``."""
    row: Row = {"name": name}
    for metric, value in flat.items():
        if metric.endswith("]"):
            group, u = metric[:-1].split("[")
            row.setdefault(group, {})[int(u)] = value
        else:
            row[metric] = value
    return row


def write_json(path: Path, content: object) -> None:
    """Writes strict JSON, all of it or nothing; a number that is not finite becomes null."""

    def finite(x):
        if isinstance(x, dict):
            return {k: finite(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not np.isfinite(x) else x

    new = path.with_suffix(".tmp")
    new.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")
    new.replace(path)


def environment() -> dict[str, object]:
    """Versions, device and flags: the numbers depend on these besides the settings."""
    packages = ("jax", "jaxlib", "optax", "numpy", "unrollgrad")
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: importlib.import_module(name).__version__ for name in packages},
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "num_processes": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "x64": jax.dtypes.canonicalize_dtype(np.float64) == np.float64,
        "prng": str(jax.random.key_impl(jax.random.key(0))),
    }


def print_tables(groups: dict[str, list[Row]]) -> None:
    """Prints a table for each named group of rows, then what the columns mean."""
    console = optional_packages.console()
    found = {title: _complete(rows) for title, rows in groups.items()}
    columns = _columns([row for rows in found.values() for row in rows])
    for title, rows in found.items():
        size = _size(rows)
        table = optional_packages.need("rich.table", "rich").Table(
            box=optional_packages.need("rich.box", "rich").SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
            title=f"{title}: {size}" if title else size,
            title_justify="left",
        )
        for column, (heading, _) in columns.items():
            left = column == "name"
            table.add_column(heading, justify="left" if left else "right", no_wrap=left)
        for row in rows:
            table.add_row(*[cell(column, row) for column in columns])
        console.print(table, "")
    width = max(len(heading) for heading, _ in columns.values())
    for heading, meaning in columns.values():
        console.print(f"{heading:>{width}}  {meaning}", style="dim", highlight=False)


def _complete(rows: list[Row]) -> list[Row]:
    """The rows with the entries of all columns of the table."""
    return [{**row, "long_run": long_run(row)} for row in at_equal_steps(rows)]


def _size(rows: list[Row]) -> str:
    """The norm of the reference, in whose units the table is."""
    return f"|g| = {rows[0]['reference_norm']:.3g}" if rows else ""


def _columns(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """The columns that these rows need."""
    columns = dict(COLUMNS)
    if len({row["inner_steps"] for row in rows}) < 2:
        del columns["nmse_equal_steps"]  # it equals the NMSE
    if all(row["long_run"] is None for row in rows):
        del columns["long_run"]
    if not any(row["num_nonfinite"] for row in rows):
        del columns["num_nonfinite"]
    return columns


def line(row: Row) -> str:
    """A row's bias, variance and error in one line, to print as soon as it is measured."""
    numbers = (f"{COLUMNS[c][0]} {cell(c, row)}" for c in ("bias", "variance", "nmse"))
    return f"{row['name']}: " + ", ".join(numbers)


def at_equal_steps(rows: list[Row]) -> list[Row]:
    """Adds ``nmse_equal_steps``: the NMSE with enough workers for the costliest row's inner steps.

    More workers divide the variance and leave the bias.
    """
    most = max((row["inner_steps"] for row in rows), default=0)

    def with_more_workers(row: Row) -> Row:
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.divide(row["variance"], np.square(row["reference_norm"]))
            return {**row, "nmse_equal_steps": row["nmse"] - gain * (1 - row["inner_steps"] / most)}

    return [with_more_workers(row) for row in rows]


def long_run(row: Row) -> float | None:
    """The row's ``variance_of_mean`` over the longest run; None if only single episodes ran."""
    values = row.get("variance_of_mean", {})
    longest = max(values, default=0)
    return values[longest] if longest > row.get("num_windows", 1) else None


def cell(column: str, row: Row) -> str:
    """A row's entry in a column of the table; bias and variance are in units of |g| and |g|²."""
    value, norm = row[column], np.float64(row["reference_norm"])
    if value is None or isinstance(value, str):
        return value or "-"
    if column in ("inner_steps", "num_nonfinite"):
        return f"{value:.0f}"
    if column in ("norm_ratio", "cosine") and abs(value) < 1000:
        return f"{value:.2f}"
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if column in ("variance", "long_run"):
            return f"{value / norm**2:.2g}"
        if column != "bias":
            return f"{value:.2g}"
        bias, error = value / norm, row["bias_se"] / norm
    if bias > 3 * error or not np.isfinite(bias):
        return f"{bias:.2g} ± {error:.1g}"
    return f"< {bias + 2 * error:.2g}" if bias + error > 0 else "0"
