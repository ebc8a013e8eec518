"""Measured numbers with their errors: leave-one-out replicates. Plain NumPy, float64.

A measured number is an array: first the number itself, then what it would be without the first
probe, without the second, and so on. Functions of measured numbers are the same functions of the
arrays, element by element, and the spread of the replicates is the error of whatever comes out, so
that numbers from the same probes share their noise. An exact number is an array with one element.
"""

import numpy as np

__all__ = ["difference_se", "leave_one_out", "squared_norm_of_mean", "standard_error"]


def leave_one_out(samples: np.ndarray) -> np.ndarray:
    """The mean over the first axis, and the means without each of its entries, shape (1 + R, ...).

    Example:
        >>> leave_one_out(np.array([1.0, 2.0, 6.0])).tolist()
        [3.0, 4.0, 3.5, 1.5]
    """
    samples = np.asarray(samples, np.float64)
    total, number = samples.sum(axis=0), len(samples)
    if number == 1:
        return samples
    return np.concatenate([total[None] / number, (total - samples) / (number - 1)])


def standard_error(measured: np.ndarray) -> float:
    """The jackknife standard error of a measured number; 0 if it is exact."""
    others = np.asarray(measured)[1:]
    if len(others) == 0:
        return 0.0
    return float(np.sqrt((len(others) - 1) * np.mean((others - others.mean()) ** 2)))


def difference_se(a: np.ndarray, b: np.ndarray) -> float:
    """The standard error of a - b, for numbers measured with the same probes."""
    return standard_error(np.subtract(a, b))


def squared_norm_of_mean(samples: np.ndarray) -> np.ndarray:
    """|E x|^2 as a measured number: the mean product of samples that differ in both indices or one.

    Args:
        samples: Shape (R, E, P): R groups of E independent samples; a replicate leaves a group out.
    """
    samples = np.asarray(samples, np.float64)
    groups, each = samples.shape[:2]
    total, squares = samples.sum(axis=1), np.sum(samples**2, axis=(1, 2))
    sums = np.concatenate([total.sum(axis=0)[None], total.sum(axis=0) - total])
    rests = np.concatenate([[squares.sum()], squares.sum() - squares])
    number = each * np.array([groups, *[groups - 1] * groups])
    return (np.sum(sums**2, axis=1) - rests) / (number * (number - 1))
