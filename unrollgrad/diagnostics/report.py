"""The result of ``compare``, and its table, picture and files."""

import csv
import functools
import importlib
import io
import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from unrollgrad._core import optional_packages
from unrollgrad.diagnostics.statistics import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {
    "name": "estimator",
    "bias": "bias",
    "bias_se": "±SE",
    "variance": "var",
    "long_run": "long run",
    "norm_ratio": "norm ratio",
    "cosine": "cosine",
    "snr": "SNR",
    "nmse": "NMSE",
    "nmse_equal_steps": "at equal steps",
    "inner_steps": "steps",
    "seconds": "s",
    "num_nonfinite": "left out",
}


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

    def table(self) -> None:
        """Prints the rows. Needs rich (``pip install "unrollgrad[experiments]"``)."""
        print_table(self.rows)

    def plot(self) -> "Figure":
        """Draws bias against noise, variance against U, and the error against its cost.

        Left: a triangle is an upper limit, drawn if no bias was seen. Middle: ``variance_of_mean``,
        the variance per episode spent when U consecutive updates are averaged. Right: the squared
        error against inner steps, from the measured number of workers (the point) to 1000 times as
        many; a vertical line compares estimators at equal inner steps. It is dotted where a bias
        too small for this measurement could dominate.

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


def print_table(rows: list[Row], title: str | None = None) -> None:
    """Prints rows as ``Comparison.table`` does."""
    console = optional_packages.console()
    rows = [{**row, "long_run": long_run(row)} for row in at_equal_steps(rows)]
    columns = dict(COLUMNS)
    if len({row["inner_steps"] for row in rows}) < 2:
        del columns["nmse_equal_steps"]  # it equals the NMSE
    if all(row["long_run"] is None for row in rows):
        del columns["long_run"]
    if not any(row["num_nonfinite"] for row in rows):
        del columns["num_nonfinite"]
    table = optional_packages.need("rich.table", "rich").Table(
        box=optional_packages.need("rich.box", "rich").SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title=title,
        caption="norm ratio, cosine: of the mean to the reference; var, steps, s: per sample; "
        "long run: var per episode over 20 episodes",
    )
    for column, heading in columns.items():
        left = column == "name"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    for row in rows:
        table.add_row(*[_format(column, row[column]) for column in columns])
    console.print(table)


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


def draw(groups: dict[str, list[Row]]) -> "Figure":
    """Draws rows as ``Comparison.plot`` does, one line of panels for each named group."""
    figure = optional_packages.need("matplotlib.figure", "matplotlib").Figure(
        figsize=(14, 0.6 + 4.2 * len(groups)), layout="constrained"
    )
    lines = figure.subplots(len(groups), 3, squeeze=False)
    colors = {}
    for (title, rows), axes in zip(groups.items(), lines, strict=True):
        for panel, axis in zip((_bias_and_noise, _variance_of_means, _cost), axes, strict=True):
            with np.errstate(divide="ignore", invalid="ignore"):  # a reference of zero
                panel(axis, rows)
            axis.grid(alpha=0.3)
        colors |= {row["name"]: f"C{i}" for i, row in enumerate(rows)}
        if title:
            axes[0].annotate(title, (0, 1.1), None, "axes fraction", fontsize=12, weight="bold")
    patch = optional_packages.need("matplotlib.patches", "matplotlib").Patch
    handles = [patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=max(len(handles), 1))
    figure._repr_png_ = functools.partial(_png, figure)  # so that a notebook shows it
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80)
    return buffer.getvalue()


def _bias_and_noise(axis: "Axes", rows: list[Row]) -> None:
    names = ("reference_norm", "bias", "bias_se", "variance")
    columns = [[row[name] for row in rows] for name in names]
    norm, bias, bias_se, variance = np.array(columns, float)
    bias, bias_se, deviation = bias / norm, bias_se / norm, np.sqrt(variance) / norm
    seen = bias > 3 * bias_se
    height = np.where(seen, bias, bias + 2 * bias_se)
    shown = np.concatenate([height, deviation])
    floor = np.min(shown, where=_positive(shown), initial=np.inf) / 3
    axis.set(
        xlabel="standard deviation of a sample / |g|",
        ylabel="bias / |g|",
        title="●  bias ± SE      ▼  no bias seen: upper limit (2 SE)",
    )
    if not np.isfinite(floor):
        axis.text(0.5, 0.5, "no finite bias or spread", ha="center", transform=axis.transAxes)
        return
    axis.set(xscale="log", yscale="log")
    for i, row in enumerate(rows):
        place = max(deviation[i], floor), max(height[i], floor)
        error, marker = (bias_se[i], "o") if seen[i] else (None, "v")
        style = {"capsize": 3, "markersize": 7, "color": f"C{i}", "label": row["name"]}
        axis.errorbar(*place, yerr=error, fmt=marker, **style)
        if height[i] == 0:
            axis.annotate("0", place, xytext=(6, 0), textcoords="offset points")


def _variance_of_means(axis: "Axes", rows: list[Row]) -> None:
    axis.set(
        xscale="log",
        xlabel="updates averaged, in episodes (U/n)",
        ylabel="variance of their mean × U/n / |g|²",
        title="variance per episode spent",
    )
    for i, row in enumerate(rows):
        u, values = np.array(list(row["variance_of_mean"].items()), float).reshape(-1, 2).T
        values = values / np.square(row["reference_norm"])
        errors = np.array(list(row["variance_of_mean_se"].values()))
        errors = np.minimum(errors / np.square(row["reference_norm"]), 0.9 * values)
        shown = _positive(values)
        if shown.any():
            axis.set_yscale("log")
            style = {"fmt": "o-", "capsize": 3, "markersize": 5, "color": f"C{i}"}
            axis.errorbar(u[shown] / row["num_windows"], values[shown], errors[shown], **style)


def _cost(axis: "Axes", rows: list[Row]) -> None:
    axis.set(
        xlabel="inner steps per estimate",
        ylabel="squared error / |g|² (NMSE)",
        title="error as workers are added",
    )
    more = np.geomspace(1, 1000, 60)
    for i, row in enumerate(rows):
        norm = np.float64(row["reference_norm"])
        seen = row["bias"] > 3 * row["bias_se"]
        bias = row["bias"] / norm if seen else 0.0
        hidden = 0.0 if seen else (row["bias"] + 2 * row["bias_se"]) / norm
        noise = row["variance"] / norm**2 / more
        error = bias**2 + noise
        if not _positive(error).all():
            continue
        axis.set(xscale="log", yscale="log")
        steps = row["inner_steps"] * more
        known = max(int(np.sum(noise >= hidden**2)), 1)
        axis.plot(steps[:known], error[:known], marker="o", markevery=[0], color=f"C{i}")
        axis.plot(steps[known - 1 :], error[known - 1 :], linestyle=":", color=f"C{i}")


def _positive(x: np.ndarray) -> np.ndarray:
    return (x > 0) & np.isfinite(x)


def _format(column: str, value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    if column in ("inner_steps", "num_nonfinite"):
        return f"{value:.0f}"
    two_decimals = column in ("norm_ratio", "cosine") and abs(value) < 1000
    return f"{value:.2f}" if two_decimals else f"{value:.2g}"
