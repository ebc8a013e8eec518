"""Ridge regression by gradient descent; theta is the log weight of L2.

The diabetes data are 10 measurements of 442 real patients, and the progress of their disease a year
later. They come with scikit-learn. The papers' yacht data are read from a file; nothing is
downloaded.
"""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug
from unrollgrad.running import need


class Split(NamedTuple):
    """Standardised inputs and targets for training and for validation."""

    x: jax.Array
    y: jax.Array
    x_validation: jax.Array
    y_validation: jax.Array


def diabetes() -> Split:
    """Four fifths of the patients are for training, the others for validation.

    All are standardised by the training examples' mean and standard deviation.

    The order is the first among ``default_rng(0)``, ``(1)`` and so on for which the validation loss
    of the ridge solution has a single minimum over L2's weight, so that every start leads to it.
    """
    x, y = need("sklearn.datasets", "scikit-learn").load_diabetes(return_X_y=True, scaled=False)
    order = np.random.default_rng(2).permutation(len(x))
    count = len(x) * 4 // 5
    data = np.column_stack([x, y])[order]
    data = (data - data[:count].mean(axis=0)) / data[:count].std(axis=0)
    return _split(data, count)


YACHT = (308, 7)
"""Rows and columns of the yacht data: six measurements of a hull, and its resistance."""


def yacht(path: Path) -> Split:
    """The papers' split of UCI's Yacht Hydrodynamics: 246 rows for training, 62 for validation.

    As in the released code of Vicol et al. 2021, all rows together are standardised, and numpy's
    older generator with seed 1 draws their order.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is not the table of 308 rows and 7 columns.
    """
    fix = "Pass UCI's file yacht_hydrodynamics.data, as it is."
    try:
        data = np.loadtxt(path)
    except ValueError as error:
        raise ValueError(f"`data`: {path} is not a table of numbers: {error}. {fix}") from error
    if data.shape != YACHT:
        raise ValueError(f"`data`: {path} has shape {data.shape}, not {YACHT}. {fix}")
    data = (data - data.mean(axis=0)) / data.std(axis=0)
    order = np.random.RandomState(1).permutation(len(data))
    return _split(data[order], round(0.8 * len(data)))


def _split(data: np.ndarray, count: int) -> Split:
    """The first ``count`` rows are for training; the last column is the target."""
    train, validation = data[:count], data[count:]
    arrays = (train[:, :-1], train[:, -1], validation[:, :-1], validation[:, -1])
    return Split(*(jnp.asarray(a, jnp.float32) for a in arrays))


def validation_loss(data: Split, w: jax.Array) -> jax.Array:
    """Half the sum of squared errors on the validation data."""
    return 0.5 * jnp.sum((data.x_validation @ w - data.y_validation) ** 2)


def ridge(data: Split, horizon: int, learning_rate: float = 1e-3) -> ug.UnrolledProblem:
    """Full-batch gradient descent on |x w - y|^2 / 2 + exp(theta) |w|^2 / 2 from w ~ N(0, 1).

    The step loss is the validation loss after the step; theta is a scalar.
    """
    square, cross = data.x.T @ data.x, data.x.T @ data.y

    def init(key, theta):
        return jax.random.normal(key, cross.shape, theta.dtype)

    def step(key, theta, w, t):
        w = w - learning_rate * (square @ w - cross + jnp.exp(theta) * w)
        return w, validation_loss(data, w)

    return ug.UnrolledProblem(init, step, horizon)


def converged_loss(data: Split, theta: jax.Array) -> jax.Array:
    """The validation loss of the ridge solution, to which gradient descent converges."""
    square = data.x.T @ data.x + jnp.exp(theta) * jnp.eye(data.x.shape[1])
    return validation_loss(data, jnp.linalg.solve(square, data.x.T @ data.y))


def best_log_l2(data: Split, least: float = -8.0, most: float = 8.0) -> float:
    """The theta between ``least`` and ``most`` with the lowest ``converged_loss``, to 1e-3."""
    at = jnp.arange(least, most, 1e-3)
    losses = jax.jit(jax.vmap(lambda theta: converged_loss(data, theta)))(at)
    return float(at[jnp.argmin(losses)])
