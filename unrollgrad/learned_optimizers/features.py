"""Inputs of a learned optimizer: features of a weight, of its tensor, and of the time."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad.types import ArrayDType, Numeric

__all__ = [
    "TINY",
    "Factored",
    "averages",
    "factored_averages",
    "factored_rsqrt",
    "factored_zeros",
    "mean_square",
    "normalised",
    "of_tensor",
    "time",
]

TINY = 1e-10
"""Added to mean squares, so that derivatives are finite where a tensor is zero. Tensors whose root
mean square is below 1e-5 look smaller than they are."""


def averages(old: jax.Array, new: jax.Array, decays: Sequence[float]) -> jax.Array:
    """Updated exponential averages of an array, one for each decay, along the last axis."""
    kept = jnp.asarray(decays, old.dtype)
    return kept * old + (1 - kept) * new[..., None]


def mean_square(x: jax.Array) -> jax.Array:
    """Mean square of each feature over the tensor: from (*shape, features) to (features,)."""
    return jnp.mean(jnp.square(x), axis=tuple(range(x.ndim - 1)))


def normalised(x: jax.Array) -> jax.Array:
    """Each feature divided by its root mean square over the tensor; (weights, features)."""
    x = x * jax.lax.rsqrt(mean_square(x) + TINY)
    return x.reshape(-1, x.shape[-1])


def time(count: Numeric, times: Sequence[float], dtype: ArrayDType) -> jax.Array:
    """tanh(t / T - 1) for each T: whether step t is early or late relative to T steps."""
    return jnp.tanh(jnp.asarray(count, dtype) / jnp.asarray(times, dtype) - 1)


def of_tensor(x: jax.Array, time: jax.Array) -> jax.Array:
    """Features of a whole tensor: log root mean squares, log size, number of axes, and the time."""
    sizes = 0.05 * jnp.log(mean_square(x) + TINY)
    shape = [0.1 * math.log(math.prod(x.shape[:-1])), x.ndim - 1]
    return jnp.concatenate([sizes, jnp.asarray(shape, sizes.dtype), time])


class Factored(NamedTuple):
    """Factored averages of squared gradients (Adafactor).

    Attributes:
        rows: The mean over columns, the last axis, of each row: (*batch, rows, decays).
        columns: The mean over rows of each column: (*batch, columns, decays). For tensors with
            fewer than two axes it is empty, and ``rows`` are averages of the squares themselves.
    """

    rows: jax.Array
    columns: jax.Array


def factored_zeros(shape: tuple[int, ...], count: int, dtype: ArrayDType) -> Factored:
    """Averages before the first gradient, for ``count`` decays."""
    if len(shape) < 2:
        return Factored(jnp.zeros((*shape, count), dtype), jnp.zeros((0, count), dtype))
    return Factored(
        jnp.zeros((*shape[:-1], count), dtype),
        jnp.zeros((*shape[:-2], shape[-1], count), dtype),
    )


def factored_averages(old: Factored, grad: jax.Array, decays: Sequence[float]) -> Factored:
    """Averages that include one more gradient."""
    square = jnp.square(grad)
    if square.ndim < 2:
        return Factored(averages(old.rows, square, decays), old.columns)
    return Factored(
        averages(old.rows, jnp.mean(square, axis=-1), decays),
        averages(old.columns, jnp.mean(square, axis=-2), decays),
    )


def factored_rsqrt(found: Factored, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """1 / root of the factored average, of the rows, and of the columns: (*shape, decays) each."""
    rows, columns = found
    if len(shape) < 2:
        root = jax.lax.rsqrt(rows + TINY)
        return root, root, root
    mean = jnp.mean(rows, axis=-2, keepdims=True)
    of_rows = jax.lax.rsqrt(rows / (mean + TINY) + TINY)[..., None, :]
    of_columns = jax.lax.rsqrt(columns + TINY)[..., None, :, :]
    whole = (*shape, rows.shape[-1])
    return (
        of_rows * of_columns,
        jnp.broadcast_to(jax.lax.rsqrt(rows + TINY)[..., None, :], whole),
        jnp.broadcast_to(of_columns, whole),
    )
