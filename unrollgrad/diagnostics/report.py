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
    "norm": "|mean|",
    "bias": "bias",
    "bias_se": "± SE",
    "variance": "variance",
    "norm_ratio": "norm ratio",
    "cosine": "cosine",
    "snr": "SNR",
    "nmse": "NMSE",
    "inner_steps": "inner steps",
    "seconds": "seconds",
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
        console, table = (
            _need("rich.console", "rich").Console(),
            _need("rich.table", "rich").Table(),
        )
        for column, title in COLUMNS.items():
            left = column == "name"
            table.add_column(title, justify="left" if left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*[_format(row[column]) for column in COLUMNS])
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
        figsize=(11, 4.5), layout="constrained"
    )
    left, right = figure.subplots(1, 2)
    bias = [row["bias"] / norm for row in rows]
    bias_se = [row["bias_se"] / norm for row in rows]
    deviation = [np.sqrt(row["variance"]) / norm for row in rows]
    positive = [x for x in [*bias, *bias_se, *deviation] if x > 0] or [1.0]
    floor = min(positive) / 2
    for i, row in enumerate(rows):
        upper = max(bias[i] + bias_se[i], floor)
        shown = max(bias[i], floor)
        left.errorbar(
            max(deviation[i], floor),
            shown,
            yerr=[[min(bias_se[i], shown - floor)], [upper - shown]],
            fmt="o" if bias[i] > 2 * bias_se[i] else "v",
            capsize=3,
            label=row["name"],
        )
    left.set(
        xscale="log",
        yscale="log",
        xlabel="standard deviation of a sample / |g|",
        ylabel="bias / |g|  (± SE; ▽: no bias seen)",
        title="bias against spread, one episode",
    )
    left.grid(alpha=0.3, which="both")
    left.legend(fontsize=8)
    names = [row["name"] for row in rows][::-1]
    squared = np.square(bias[::-1])
    spread = np.square(deviation[::-1])
    y = np.arange(len(rows))
    right.barh(y + 0.2, np.maximum(squared, floor**2), 0.4, label="bias²")
    right.barh(y - 0.2, np.maximum(spread, floor**2), 0.4, label="variance")
    right.set(
        xscale="log",
        yticks=y,
        yticklabels=names,
        xlabel="squared error / |g|²",
        title="what the error is made of",
    )
    right.grid(alpha=0.3, axis="x")
    right.legend(fontsize=8)
    return figure


def _format(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else f"{value:,}"
        if isinstance(value, int)
        else f"{value:.3g}"
    )


def _need(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'this needs {package}: pip install "unrollgrad[experiments]"') from error
