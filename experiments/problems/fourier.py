"""The toys of ``warm_vs_cold``: regression on a Fourier basis with more weights than data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from unrollgrad.running import need

TARGETS = 13
"""Number of antidistillation's targets, which lie on a grid."""


def features(x: Any, frequencies: int) -> jax.Array:
    """The features 1, cos(n x) / n and sin(n x) / n: low frequencies need small weights."""
    n = jnp.arange(1, frequencies + 1)
    angle = jnp.asarray(x)[..., None] * n
    one = jnp.ones((*angle.shape[:-1], 1))
    return jnp.concatenate([one, jnp.cos(angle) / n, jnp.sin(angle) / n], axis=-1)


class Data(NamedTuple):
    """Real points, and the initial synthetic point theta."""

    x: jax.Array
    y: jax.Array
    theta: jax.Array


def one_point_data(kind: str, key: jax.Array) -> Data:
    """Draws the data of one point; the settings of ``warm_vs_cold`` explain the kinds."""
    keys = jax.random.split(key, 3)
    noise = jax.random.normal(keys[1], (5,))
    signs = jnp.array([1.0, -1.0, 1.0, -1.0, 1.0])
    y = 0.5 * signs + 0.1 * noise if kind == "alternating" else 0.5 * noise
    return Data(one_in_each(keys[0], 5, 0.5), y, 0.5 * jax.random.normal(keys[2], (2,)))


def one_in_each(key: jax.Array, count: int, share: float) -> jax.Array:
    """Draws one x in the middle share of each of ``count`` equal parts of (-pi, pi)."""
    inside = jax.random.uniform(key, (count,), minval=-share / 2, maxval=share / 2)
    return (jnp.arange(count) + 0.5 + inside) * 2 * jnp.pi / count - jnp.pi


class OnePoint(NamedTuple):
    """The bilevel problem with one synthetic point."""

    outer: Callable[[Any, Any], Any]
    inner: Callable[[Any, Any], Any]
    optimizer: optax.GradientTransformation
    hypergradient: Callable[..., Any]


def one_point(data: Data, frequencies: int, damping: float) -> OnePoint:
    """One step of ``optimizer`` from w reaches the minimum of inner + damping / 2 |. - w|^2."""

    def inner(w, theta):
        return (features(theta[0], frequencies) @ w - theta[1]) ** 2 / 2

    def outer(w, theta):
        return jnp.mean((features(data.x, frequencies) @ w - data.y) ** 2)

    square = float(1 + np.sum(1 / np.arange(1, frequencies + 1) ** 2))  # |features|^2 for any x
    solver = need("lineax", "lineax").CG(1e-10, 1e-10, max_steps=5)  # there are two eigenvalues
    hypergradient = ug.implicit.hypergradient(outer, inner, solver=solver, damping=damping)
    return OnePoint(outer, inner, optax.sgd(1 / (square + damping)), hypergradient)


def grid() -> np.ndarray:
    """The inputs x of antidistillation's targets."""
    return (np.arange(TARGETS) + 0.5) * 2 * np.pi / TARGETS - np.pi
