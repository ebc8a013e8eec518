"""Bias, variance and their errors from independent samples of a vector. Plain NumPy, float64."""

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "Row",
    "describe",
    "pooled",
    "root_se",
    "squared_distance",
    "squares",
    "standard_error",
    "total_variance",
]

Row = dict[str, Any]
"""The numbers of one estimator by name, among them ``name`` and dicts by U: see ``compare``."""


def describe(samples: np.ndarray, reference: np.ndarray) -> Row:
    """Compares samples of an estimator with samples of a reference.

    Args:
        samples: Shape (n, P), n >= 3.
        reference: Shape (m, P); m = 1 means that it is exact.

    Returns:
        A dict with ``norm`` |mean|; ``bias`` |mean - g| without the noise of both means, and its
        jackknife standard error ``bias_se``; ``squared_bias``, which may be negative, and
        ``squared_bias_se``, to average over repetitions; ``variance``, the trace of one sample's
        covariance; ``norm_ratio`` |mean| / |g|; ``cosine`` of mean and g; ``snr`` |mean| /
        sqrt(variance); ``nmse`` (bias^2 + variance) / |g|^2; ``reference_norm`` |g|.
    """
    mean, g = samples.mean(axis=0), reference.mean(axis=0)
    norm, g_norm = float(np.linalg.norm(mean)), float(np.linalg.norm(g))
    squared_bias, squared_bias_se = squared_distance(samples, reference)
    row = {
        "norm": norm,
        "bias": float(np.sqrt(max(squared_bias, 0.0))),
        "bias_se": root_se(squared_bias, squared_bias_se),
        "squared_bias": squared_bias,
        "squared_bias_se": squared_bias_se,
        "variance": total_variance(samples),
        "reference_norm": g_norm,
    }
    with np.errstate(divide="ignore", invalid="ignore"):
        row["cosine"] = float(np.divide(mean @ g, norm * g_norm))
    return _with_ratios(row)


def _with_ratios(row: Row) -> Row:
    norm, reference, variance = row["norm"], row["reference_norm"], row["variance"]
    with np.errstate(divide="ignore", invalid="ignore"):
        row["norm_ratio"] = float(np.divide(norm, reference))
        row["snr"] = float(np.divide(norm, np.sqrt(variance)))
        row["nmse"] = float(np.divide(row["bias"] ** 2 + variance, reference**2))
    return row


def total_variance(samples: np.ndarray) -> float:
    """The trace of the samples' covariance, unbiased."""
    return float(np.mean(squares(samples)))


def pooled(rows: list[Row]) -> Row:
    """One row from the rows of one estimator in independent repetitions.

    Squared biases, variances and squared norms are averaged, and the ratios are made of the
    averages: the mean of roots would be biased, and the smallest gradient would rule the mean of
    ratios.
    """
    if len(rows) == 1:
        return rows[0]

    def pool(metric: str, by: Callable[[list[float]], float]) -> float | dict[int, float]:
        values = [row[metric] for row in rows]
        if isinstance(values[0], dict):
            return {u: float(by([v[u] for v in values])) for u in values[0]}
        return float(by(values))

    def root_mean_square(values):
        return np.sqrt(np.mean([x**2 for x in values]))

    def error_of_mean(errors):
        return np.sqrt(np.sum(np.square(errors))) / len(errors)

    by = dict.fromkeys(("squared_bias_se", "variance_of_mean_se"), error_of_mean)
    by |= dict.fromkeys(("norm", "reference_norm"), root_mean_square)
    first = rows[0].items()
    out: Row = {k: v if isinstance(v, str) else pool(k, by.get(k, np.mean)) for k, v in first}
    out["bias"] = float(np.sqrt(max(out["squared_bias"], 0.0)))
    out["bias_se"] = root_se(out["squared_bias"], out["squared_bias_se"])
    return _with_ratios(out)


def squares(samples: np.ndarray) -> np.ndarray:
    """Each sample's contribution to ``total_variance``, which is their mean."""
    away = samples - samples.mean(axis=0)
    return np.sum(away**2, axis=1) * len(samples) / (len(samples) - 1)


def standard_error(x: np.ndarray) -> float:
    """The standard error of the mean of ``x``."""
    return float(np.std(x, ddof=1) / np.sqrt(len(x)))


def squared_distance(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """|E x - E y|^2, unbiased, and its standard error by the jackknife over both samples.

    Args:
        x: Shape (n, P), n >= 3.
        y: Shape (m, P); m = 1 means that it is exact; m = 2 is not allowed.
    """
    value, variance = _squared_norm(x - y.mean(axis=0))
    if len(y) > 1:
        value -= total_variance(y) / len(y)
        variance += _squared_norm(y - x.mean(axis=0))[1]
    return value, float(np.sqrt(variance))


def _squared_norm(x: np.ndarray) -> tuple[float, float]:
    """|E x|^2 as the mean of x_i.x_j over i != j, and its jackknife variance."""
    n, total = len(x), x.sum(axis=0)
    squares = np.sum(x**2, axis=1)
    value = (total @ total - squares.sum()) / (n * (n - 1))
    rest = np.sum((total - x) ** 2, axis=1) - (squares.sum() - squares)
    without = rest / ((n - 1) * (n - 2))
    return float(value), float((n - 1) / n * np.sum((without - without.mean()) ** 2))


def root_se(square: float, square_se: float) -> float:
    """The standard error of a square root: sqrt(square) - sqrt(square - square_se).

    Far from zero this is square_se / (2 root). Within one error of zero it is sqrt(square_se): the
    slope of the root would let noise look like a bias of several errors.
    """
    if square <= square_se:
        return float(np.sqrt(square_se))
    return float(np.sqrt(square) - np.sqrt(square - square_se))
