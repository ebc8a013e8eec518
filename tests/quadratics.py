"""Inner problems with a known minimum and a known outer gradient through it.

NumPy computes the known values in double precision, so that a problem compiles one program; equal
arguments give the same problem. Use the functions under ``jax.enable_x64``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Ridge(NamedTuple):
    """Ridge regression with one decay per weight, theta = log decay; outer: other data."""

    inner: Any
    outer: Any
    params: np.ndarray
    theta: np.ndarray
    exact: np.ndarray
    hessian: np.ndarray


def _normal(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Standard normal numbers of each shape, in double precision."""

    @jax.jit
    def draw():
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]

    with jax.enable_x64(True):
        return [np.asarray(x) for x in draw()]


@functools.cache
def ridge(num_weights: int = 8, num_rows: int = 30, decay: float = 1.0) -> Ridge:
    rows, weights = (num_rows,), (num_weights,)
    x, x_val, y, y_val, log_decay = _normal(0, rows + weights, rows + weights, rows, rows, weights)
    theta = 0.3 * log_decay + np.log(decay)

    def inner(w, theta):
        return jnp.mean((x @ w - y) ** 2) / 2 + jnp.sum(jnp.exp(theta) * w**2) / 2

    def outer(w, theta):
        return jnp.mean((x_val @ w - y_val) ** 2) / 2 + 0.01 * jnp.sum(theta**2)

    hessian = x.T @ x / num_rows + np.diag(np.exp(theta))
    minimum = np.linalg.solve(hessian, x.T @ y / num_rows)
    slope = x_val.T @ (x_val @ minimum - y_val) / num_rows
    exact = 0.02 * theta - np.exp(theta) * minimum * np.linalg.solve(hessian, slope)
    return Ridge(inner, outer, minimum, theta, exact, hessian)


class Quadratic(NamedTuple):
    """inner = w H w / 2 - w (C theta), outer = |w - target|^2 / 2, so that B = -C."""

    inner: Any
    outer: Any
    hessian: np.ndarray
    mixed: np.ndarray
    target: np.ndarray

    def minimum(self, theta: np.ndarray) -> np.ndarray:
        """The inner minimum of least norm."""
        return np.linalg.pinv(self.hessian, hermitian=True) @ self.mixed @ theta


def quadratic(eigenvalues: Any, num_theta: int = 3) -> Quadratic:
    """A problem whose H has the given spectrum; C lies in the range of H."""
    return _quadratic(tuple(float(h) for h in eigenvalues), num_theta)


@functools.cache
def _quadratic(spectrum, num_theta):
    eigenvalues, dim = np.array(spectrum), len(spectrum)
    draw, mixed, target = _normal(1, (dim, dim), (dim, num_theta), (dim,))
    basis = np.linalg.qr(draw)[0]
    hessian = basis @ np.diag(eigenvalues) @ basis.T
    mixed = basis @ ((eigenvalues != 0)[:, None] * (basis.T @ mixed))
    return Quadratic(
        lambda w, theta: w @ hessian @ w / 2 - w @ (mixed @ theta),
        lambda w, theta: jnp.sum((w - target) ** 2) / 2,
        hessian,
        mixed,
        target,
    )
