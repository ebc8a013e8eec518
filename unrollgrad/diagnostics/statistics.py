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
        jackknife standard error ``bias_se``; ``variance``, the trace of one sample's covariance;
        ``norm_ratio`` |mean| / |g|; ``cosine`` of mean and g; ``snr`` |mean| / sqrt(variance);
        ``nmse`` (bias^2 + variance) / |g|^2; ``reference_norm`` |g|.
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
            "bias_se": _root_se(squared_bias, squared_bias_se),
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


def _root_se(square: float, square_se: float) -> float:
    """The standard error of a square root: how far down the root of one error less is.

    Far from zero that is square_se / (2 root); within one error of zero sqrt(square_se), so that
    noise never looks like a bias of several errors, as the slope of the root would have it.
    """
    if square <= square_se:
        return float(np.sqrt(square_se))
    return float(np.sqrt(square) - np.sqrt(square - square_se))
