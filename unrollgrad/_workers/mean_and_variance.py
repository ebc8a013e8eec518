"""Mean and spread of many gradients, gathered from chunks and devices without losing digits."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unrollgrad._core.dtypes import wide
from unrollgrad.types import ArrayTree, AverageInfo, Estimate, Key, Theta

SKETCH = 128
"""The largest number of numbers that stand for a device's mean gradient in ``grad_variance``."""


_MOST = np.int32(2**31 - 1)


class Moments(NamedTuple):
    """Mean, spread and counts of several workers' estimates.

    Attributes:
        count: int32, the number of workers in the mean.
        grad: The mean gradient, at least float32; 0 if no worker is in the mean.
        loss: The mean loss.
        squares: The sum over the workers in the mean of |gradient - mean gradient|^2.
        inner_steps: int32, the inner steps of all workers.
        num_nonfinite: int32, the number of workers with a non-finite loss or gradient.
        num_nonfinite_losses: int32, the number of workers with a non-finite loss.
    """

    count: jax.Array
    grad: Theta
    loss: jax.Array
    squares: jax.Array
    inner_steps: jax.Array
    num_nonfinite: jax.Array
    num_nonfinite_losses: jax.Array


def of(each: Estimate, finite: jax.Array, counted: jax.Array) -> Moments:
    """Computes the moments of estimates with a leading axis; ``counted`` ones are in the mean."""
    count = jnp.sum(counted, dtype=jnp.int32)

    def mean(x):
        x = _where(counted, x.astype(wide(x.dtype)))
        # A product: on CPUs XLA's sum over a leading axis takes up to forty times as long.
        total = jnp.tensordot(jnp.ones(len(x), x.dtype), x, 1, precision=jax.lax.Precision.HIGHEST)
        return total / jnp.maximum(count, 1).astype(x.dtype)

    def squares(g, m):
        return jnp.sum(_where(counted, jnp.square(g.astype(m.dtype) - m[None])))

    grad = jax.tree.map(mean, each.grad)
    return Moments(
        count=count,
        grad=grad,
        loss=mean(each.loss),
        squares=jnp.asarray(optax.tree.sum(jax.tree.map(squares, each.grad, grad))),
        inner_steps=jax.lax.reduce(each.info.inner_steps, jnp.int32(0), _saturating_add, (0,)),
        num_nonfinite=jnp.sum(~finite, dtype=jnp.int32),
        num_nonfinite_losses=jnp.sum(~jnp.isfinite(each.loss), dtype=jnp.int32),
    )


def merge(a: Moments, b: Moments) -> Moments:
    """Combines the moments of two groups of workers (Chan, Golub and LeVeque 1979)."""
    count = a.count + b.count

    def weight(x):
        return b.count.astype(x.dtype) / jnp.maximum(count, 1).astype(x.dtype)

    away = jax.tree.map(jnp.subtract, b.grad, a.grad)
    between = optax.tree.norm(away, squared=True)
    return Moments(
        count=count,
        grad=jax.tree.map(lambda x, d: x + weight(x) * d, a.grad, away),
        loss=a.loss + weight(a.loss) * (b.loss - a.loss),
        squares=a.squares + b.squares + a.count.astype(between.dtype) * weight(a.squares) * between,
        inner_steps=_saturating_add(a.inner_steps, b.inner_steps),
        num_nonfinite=a.num_nonfinite + b.num_nonfinite,
        num_nonfinite_losses=a.num_nonfinite_losses + b.num_nonfinite_losses,
    )


def over_devices(own: Moments, axis: str, key: Key) -> Moments:
    """Combines ``own``, the moments of each device's workers, in one ``psum`` over ``axis``.

    With n_d workers and the mean m_d on device d, ``squares`` grows by sum_d n_d |m_d - m|^2. This
    needs the mean m, known only after the sum; E[x^2] - m^2 would lose its digits. So each device
    adds, in its own place, a sketch of m_d: ``SKETCH`` sums of the coordinates of m_d with random
    signs, drawn from ``key``, the same on all devices. For any vector v E|sketch(v)|^2 = |v|^2
    (Charikar, Chen and Farach-Colton 2002), without variance if theta has at most ``SKETCH``
    numbers.
    """
    device, num_devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    widest = wide(own.loss, own.squares, *jax.tree.leaves(own.grad))

    def place(x):
        """Puts ``x`` in this device's place, and 0 in the places of the others."""
        return jnp.zeros((num_devices, *x.shape), widest).at[device].set(x.astype(widest))

    def scaled(x):
        return (x * own.count.astype(x.dtype)).astype(widest)

    high, low = own.inner_steps // 4096, own.inner_steps % 4096  # both exact as floats when added
    integers = jnp.stack([high, low, own.num_nonfinite, own.num_nonfinite_losses])
    added = jax.lax.psum(
        {
            "grad": jax.tree.map(scaled, own.grad),
            "loss": scaled(own.loss),
            "squares": own.squares.astype(widest),
            "integers": integers.astype(widest),
            "counts": place(own.count),
            "sketches": place(_sketch(key, own.grad) if num_devices > 1 else jnp.zeros(0)),
        },
        axis,
    )
    counts, sketches = added["counts"], added["sketches"]
    count = jnp.sum(counts)
    per_worker = 1 / jnp.maximum(count, 1)
    mean = per_worker * jnp.sum(counts[:, None] * sketches, axis=0)
    away = sketches - mean[None]
    between = jnp.sum(counts * jnp.sum(jnp.square(away), axis=1))
    high, low, num_nonfinite, num_nonfinite_losses = added["integers"].astype(jnp.int32)
    return Moments(
        count=count.astype(jnp.int32),
        grad=jax.tree.map(lambda x, g: (x * per_worker).astype(g.dtype), added["grad"], own.grad),
        loss=(added["loss"] * per_worker).astype(own.loss.dtype),
        squares=(added["squares"] + between).astype(own.squares.dtype),
        inner_steps=jnp.where(high + low // 4096 > _MOST // 4096, _MOST, 4096 * high + low),
        num_nonfinite=num_nonfinite,
        num_nonfinite_losses=num_nonfinite_losses,
    )


def estimate(moments: Moments, theta: Theta) -> Estimate:
    """Returns the mean as an estimate for theta; NaN if no worker is in the mean."""
    count = moments.count

    def mean(x):
        return jnp.where(count > 0, x, jnp.nan)

    pairs = jnp.float32(count) * (jnp.float32(count) - 1)
    variance = moments.squares.astype(jnp.float32) / jnp.maximum(pairs, 1)
    variance = jnp.where(count > 1, variance, jnp.inf)
    info = AverageInfo(moments.inner_steps, moments.num_nonfinite, variance)
    grad = jax.tree.map(lambda g, x: mean(g).astype(x.dtype), moments.grad, theta)
    return Estimate(grad, mean(moments.loss), info)


def _saturating_add(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum of two counts, at most the largest int32."""
    return jnp.where(a > _MOST - b, _MOST, a + b)


def _where(good: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(good.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _sketch(key: Key, tree: ArrayTree) -> jax.Array:
    """At most ``SKETCH`` sums of a tree's numbers with random signs, each number in one sum.

    A large leaf is summed along its shorter axes first, so that one that is spread over devices is
    not gathered.
    """
    parts = [
        _sums(x * jax.random.rademacher(jax.random.fold_in(key, i), x.shape, x.dtype)).ravel()
        for i, x in enumerate(jax.tree.leaves(tree))
    ]
    flat = jnp.concatenate(parts)
    size = min(SKETCH, flat.size)
    return jnp.sum(jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size), axis=0)


def _sums(x: jax.Array) -> jax.Array:
    """Sums an array along axes, such that at least ``SKETCH`` numbers are left if it has as many.

    The longest axes are left; one of a multiple of ``SKETCH`` numbers is cut into so many parts.
    """
    kept, axes = 1, []
    for axis in sorted(range(x.ndim), key=lambda axis: -x.shape[axis]):
        if kept < SKETCH:
            kept *= x.shape[axis]
        else:
            axes.append(axis)
    x = jnp.sum(x, axis=tuple(axes))
    if x.ndim == 1 and x.size % SKETCH == 0:
        x = jnp.sum(x.reshape(SKETCH, -1), axis=1)
    return x
