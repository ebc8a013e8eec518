"""What ``compare`` returns, and its table, picture and files."""

import csv
import importlib
import json
import platform
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

COLUMNS = {
    "name": "estimator",
    "bias": "bias",
    "bias_se": "±SE",
    "variance": "var",
    "norm_ratio": "norm ratio",
    "cosine": "cosine",
    "snr": "SNR",
    "nmse": "NMSE",
    "inner_steps": "steps",
    "seconds": "s",
}


class Comparison(NamedTuple):
    """Estimators side by side.

    Attributes:
        rows: One dict per estimator; see ``compare``.
        samples: The raw samples by name, float64 of shape (num_samples, P), leaves of theta
            flattened in order.
        reference: Samples of the reference, (m, P); one row where it is exact.
    """

    rows: list[dict[str, Any]]
    samples: dict[str, np.ndarray]
    reference: np.ndarray

    def table(self) -> None:
        """Prints the rows. Needs rich (``pip install "unrollgrad[experiments]"``)."""
        console = _need("rich.console", "rich").Console()
        if not console.is_terminal:
            console.width = 120
        table = _need("rich.table", "rich").Table(
            box=_need("rich.box", "rich").SIMPLE_HEAD,
            show_edge=False,
            padding=(0, 1, 0, 0),
            caption="norm ratio, cosine: of the mean to the reference; var, steps, s: per sample",
        )
        for column, title in COLUMNS.items():
            left = column == "name"
            table.add_column(title, justify="left" if left else "right", no_wrap=left)
        for row in self.rows:
            table.add_row(*[_format(column, row[column]) for column in COLUMNS])
        console.print(table)

    def plot(self) -> Any:
        """Draws bias against standard deviation, and the error's two parts.

        Returns:
            A matplotlib figure. Needs matplotlib (``pip install "unrollgrad[experiments]"``).
        """
        return draw(self.rows, float(np.linalg.norm(self.reference.mean(axis=0))))

    def save(self, folder: str | Path) -> Path:
        """Writes ``metrics.csv``, ``summary.json`` and ``figure.png``; returns the folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "metrics.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        summary = {
            "rows": self.rows,
            "num_samples": {name: len(s) for name, s in self.samples.items()},
            "reference": self.reference.mean(axis=0).tolist(),
            "environment": environment(),
        }
        write_json(folder / "summary.json", summary)
        figure = self.plot()
        figure.savefig(folder / "figure.png", dpi=150)
        return folder


def write_json(path: Path, content: Any) -> None:
    """Writes strict JSON; a number that is not finite (the SNR without spread) becomes null."""

    def finite(x):
        if isinstance(x, dict):
            return {k: finite(v) for k, v in x.items()}
        if isinstance(x, list | tuple):
            return [finite(v) for v in x]
        return None if isinstance(x, float) and not np.isfinite(x) else x

    path.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n")


def environment() -> dict[str, Any]:
    """Versions and device: what a number depends on besides the settings."""
    versions = {name: importlib.import_module(name).__version__ for name in _RECORDED}
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **versions,
        "device": devices[0].device_kind,
        "num_devices": len(devices),
    }


_RECORDED = ("jax", "jaxlib", "optax", "numpy", "unrollgrad")


def draw(rows: list[dict[str, Any]], norm: float) -> Any:
    """Draws rows as ``Comparison.plot`` does; ``norm`` is that of the reference gradient."""
    figure = _need("matplotlib.figure", "matplotlib").Figure(
        figsize=(11, 4.8), layout="constrained"
    )
    left, right = figure.subplots(1, 2)
    with np.errstate(divide="ignore", invalid="ignore"):  # a reference of zero
        bias, bias_se = (np.array([row[k] for row in rows]) / norm for k in ("bias", "bias_se"))
        deviation = np.sqrt([row["variance"] for row in rows]) / norm
    seen = bias > 3 * bias_se
    height = np.where(seen, bias, bias + 2 * bias_se)
    positive = np.concatenate([height, deviation])
    positive = positive[(positive > 0) & np.isfinite(positive)]
    if not positive.size:
        figure.suptitle("nothing to show: no finite positive bias or spread relative to |g|")
        return figure
    floor = np.min(positive) / 3
    for i, row in enumerate(rows):
        left.errorbar(
            max(deviation[i], floor),
            max(height[i], floor),
            yerr=bias_se[i] if seen[i] else None,
            fmt="o" if seen[i] else "v",
            capsize=3,
            markersize=7,
            label=row["name"],
        )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="standard deviation of a sample / |g|",
        ylabel="bias / |g|",
        title="●  bias ± SE      ▼  no bias seen: upper limit (2 SE)",
    )
    left.grid(alpha=0.3)
    left.legend(fontsize=8)
    y = np.arange(len(rows))[::-1]
    parts = {"bias²": np.where(seen, bias, 0) ** 2, "variance": deviation**2}
    for offset, (part, values) in zip((0.2, -0.2), parts.items(), strict=True):
        shown = (values > 0) & np.isfinite(values)
        right.barh(y[shown] + offset, values[shown], 0.4, label=part)
    right.set(
        xscale="log",
        yticks=y,
        yticklabels=[row["name"] for row in rows],
        xlabel="squared error of a sample / |g|²",
    )
    right.grid(alpha=0.3, axis="x")
    right.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def _format(column: str, value: Any) -> str:
    if isinstance(value, str | int):
        return str(value)
    two_decimals = column in ("norm_ratio", "cosine") and abs(value) < 1000
    return f"{value:.2f}" if two_decimals else f"{value:.2g}"


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'this needs {package}: pip install "unrollgrad[experiments]"') from error
