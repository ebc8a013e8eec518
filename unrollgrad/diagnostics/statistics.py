"""Bias, variance and their errors from independent samples of a vector. Plain NumPy, float64."""

from typing import Any

import numpy as np


def describe(samples: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Compares samples of an estimator with samples of a reference.

    Args:
        samples: Shape (n, P), n >= 3.
        reference: Shape (m, P); m = 1 means that it is exact.

    Returns:
        ``norm`` |mean|; ``bias`` |mean - g| with the noise of both means taken out, and its
        jackknife standard error ``bias_se``; ``squared_bias``, which may be negative, and
        ``squared_bias_se``, to average over repetitions; ``variance``, the trace of one sample's
        covariance; ``norm_ratio`` |mean| / |g|; ``cosine`` of mean and g; ``snr`` |mean| /
        sqrt(variance); ``nmse`` (bias^2 + variance) / |g|^2; ``reference_norm`` |g|.
    """
    mean, g = samples.mean(axis=0), reference.mean(axis=0)
    norm, g_norm = float(np.linalg.norm(mean)), float(np.linalg.norm(g))
    variance = total_variance(samples)
    squared_bias, squared_bias_se = squared_distance(samples, reference)
    bias = np.sqrt(max(squared_bias, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "norm": norm,
            "bias": float(bias),
            "bias_se": root_se(squared_bias, squared_bias_se),
            "squared_bias": squared_bias,
            "squared_bias_se": squared_bias_se,
            "variance": variance,
            "norm_ratio": float(np.divide(norm, g_norm)),
            "cosine": float(np.divide(mean @ g, norm * g_norm)),
            "snr": float(np.divide(norm, np.sqrt(variance))),
            "nmse": float(np.divide(bias**2 + variance, g_norm**2)),
            "reference_norm": g_norm,
        }


def total_variance(samples: np.ndarray) -> float:
    """The trace of the samples' covariance, unbiased."""
    return float(np.mean(squares(samples)))


def pooled(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from the rows of one estimator in independent repetitions.

    Squared biases, variances and squared norms are averaged, and the ratios made of the averages:
    the mean of roots would be biased, and that of ratios ruled by the smallest gradient.
    """
    if len(rows) == 1:
        return rows[0]

    def mean(metric):
        values = [row[metric] for row in rows]
        if isinstance(values[0], dict):
            return {u: float(np.mean([v[u] for v in values])) for u in values[0]}
        return float(np.mean(values))

    def of_mean(errors):
        return float(np.sqrt(np.sum(np.square(errors)))) / len(errors)

    def se_of_mean(metric):
        values = [row[metric] for row in rows]
        if isinstance(values[0], dict):
            return {u: of_mean([v[u] for v in values]) for u in values[0]}
        return of_mean(values)

    out: dict[str, Any] = {k: v if isinstance(v, str) else mean(k) for k, v in rows[0].items()}
    out |= {k: se_of_mean(k) for k in ("squared_bias_se", "variance_of_mean_se") if k in out}
    for metric in ("norm", "reference_norm"):
        out[metric] = float(np.sqrt(np.mean([row[metric] ** 2 for row in rows])))
    out["bias"] = float(np.sqrt(max(out["squared_bias"], 0.0)))
    out["bias_se"] = root_se(out["squared_bias"], out["squared_bias_se"])
    with np.errstate(divide="ignore", invalid="ignore"):
        out["norm_ratio"] = float(np.divide(out["norm"], out["reference_norm"]))
        out["snr"] = float(np.divide(out["norm"], np.sqrt(out["variance"])))
        error = out["bias"] ** 2 + out["variance"]
        out["nmse"] = float(np.divide(error, out["reference_norm"] ** 2))
    return out


def squares(samples: np.ndarray) -> np.ndarray:
    """What each sample contributes to ``total_variance``, which is their mean."""
    away = samples - samples.mean(axis=0)
    return np.sum(away**2, axis=1) * len(samples) / (len(samples) - 1)


def standard_error(x: np.ndarray) -> float:
    """That of the mean of ``x``."""
    return float(np.std(x, ddof=1) / np.sqrt(len(x)))


def squared_distance(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """|E x - E y|^2, unbiased, and its standard error by the jackknife over both samples.

    Args:
        x: Shape (n, P), n >= 3.
        y: Shape (m, P); one row is taken as exact, and m = 2 is not allowed.
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
    """The standard error of a square root: how far down the root of one error less is.

    Far from zero that is square_se / (2 root); within one error of zero sqrt(square_se), so that
    noise never looks like a bias of several errors, as the slope of the root would have it.
    """
    if square <= square_se:
        return float(np.sqrt(square_se))
    return float(np.sqrt(square) - np.sqrt(square - square_se))
