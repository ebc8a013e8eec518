"""Mean and spread of many gradients, gathered from chunks and devices without losing digits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._core.dtypes import wide
from unrollgrad.types import AverageInfo, Estimate, Key, Theta

SKETCH = 128
"""Numbers per device that stand for its mean gradient in ``grad_variance``."""


class Moments(NamedTuple):
    """What is known of some workers' estimates together.

    Attributes:
        count: int32, the workers that count.
        grad: Their mean gradient, at least float32; 0 if none counts.
        loss: Their mean loss.
        squares: The sum over them of |their gradient - the mean|^2.
        inner_steps: int32, spent by all.
        num_nonfinite: int32, those with a non-finite loss or gradient.
        num_nonfinite_losses: int32, those of them with a non-finite loss.
    """

    count: jax.Array
    grad: Theta
    loss: jax.Array
    squares: jax.Array
    inner_steps: jax.Array
    num_nonfinite: jax.Array
    num_nonfinite_losses: jax.Array


def of(each: Estimate, finite: jax.Array, counted: jax.Array) -> Moments:
    """The moments of estimates with a leading axis, of which ``counted`` contribute."""
    count = jnp.sum(counted, dtype=jnp.int32)

    def mean(x):
        x = x.astype(wide(x.dtype))
        return jnp.sum(_where(counted, x), axis=0) / jnp.maximum(count, 1).astype(x.dtype)

    def squares(g, m):
        return jnp.sum(_where(counted, jnp.square(g.astype(m.dtype) - m)))

    grad = jax.tree.map(mean, each.grad)
    return Moments(
        count=count,
        grad=grad,
        loss=mean(each.loss),
        squares=jnp.asarray(optax.tree.sum(jax.tree.map(squares, each.grad, grad))),
        inner_steps=jnp.sum(each.info.inner_steps, dtype=jnp.int32),
        num_nonfinite=jnp.sum(~finite, dtype=jnp.int32),
        num_nonfinite_losses=jnp.sum(~jnp.isfinite(each.loss), dtype=jnp.int32),
    )


def merge(a: Moments, b: Moments) -> Moments:
    """The moments of both together (Chan, Golub and LeVeque 1979)."""
    count = a.count + b.count

    def weight(x):
        return b.count.astype(x.dtype) / jnp.maximum(count, 1).astype(x.dtype)

    away = jax.tree.map(jnp.subtract, b.grad, a.grad)
    between = optax.tree.norm(away, squared=True)
    return Moments(
        count=count,
        grad=jax.tree.map(lambda x, d: x + weight(x) * d, a.grad, away),
        loss=a.loss + weight(a.loss) * (b.loss - a.loss),
        squares=a.squares + b.squares + a.count * weight(a.squares) * between,
        inner_steps=a.inner_steps + b.inner_steps,
        num_nonfinite=a.num_nonfinite + b.num_nonfinite,
        num_nonfinite_losses=a.num_nonfinite_losses + b.num_nonfinite_losses,
    )


def over_devices(own: Moments, axis: str, key: Key) -> Moments:
    """The moments of all devices' workers together, in one ``psum``.

    What the devices' means add to ``squares``, sum_d n_d |m_d - m|^2, needs m, which is only known
    after the sum; and E[x^2] - m^2 would lose its digits. So each device adds, in a place of its
    own, a sketch of m_d: ``SKETCH`` sums of its coordinates with random signs, the same signs
    everywhere. For any vector v, E|sketch(v)|^2 = |v|^2 (Charikar, Chen and Farach-Colton 2002),
    exactly so for theta of at most ``SKETCH`` numbers.

    Args:
        own: Those of this device.
        axis: The devices' axis.
        key: The same on all devices; of the signs.
    """
    device, num_devices = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    widest = jnp.result_type(own.loss, own.squares, *jax.tree.leaves(own.grad))

    def place(x):
        """``x`` where this device's place is, 0 in those of the others."""
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
    away = sketches - per_worker * jnp.sum(counts[:, None] * sketches, axis=0)
    between = jnp.sum(counts * jnp.sum(jnp.square(away), axis=1))
    high, low, num_nonfinite, num_nonfinite_losses = added["integers"].astype(jnp.int32)
    return Moments(
        count=count.astype(jnp.int32),
        grad=jax.tree.map(lambda x, g: (x * per_worker).astype(g.dtype), added["grad"], own.grad),
        loss=(added["loss"] * per_worker).astype(own.loss.dtype),
        squares=(added["squares"] + between).astype(own.squares.dtype),
        inner_steps=4096 * high + low,
        num_nonfinite=num_nonfinite,
        num_nonfinite_losses=num_nonfinite_losses,
    )


def estimate(moments: Moments, theta: Theta) -> Estimate:
    """The mean as an estimate for theta; NaN if no worker counts."""
    count = moments.count

    def mean(x):
        return jnp.where(count > 0, x, jnp.nan)

    pairs = jnp.float32(count) * (jnp.float32(count) - 1)
    info = AverageInfo(
        inner_steps=moments.inner_steps,
        num_nonfinite=moments.num_nonfinite,
        grad_variance=jnp.where(
            count > 1, moments.squares.astype(jnp.float32) / jnp.maximum(pairs, 1), jnp.inf
        ),
    )
    grad = jax.tree.map(lambda g, x: mean(g).astype(x.dtype), moments.grad, theta)
    return Estimate(grad, mean(moments.loss), info)


def _where(good: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.where(good.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _sketch(key: Key, tree: Any) -> jax.Array:
    flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
    signed = flat * jax.random.rademacher(key, flat.shape, flat.dtype)
    size = min(SKETCH, flat.size)
    return jnp.sum(jnp.pad(signed, (0, -flat.size % size)).reshape(-1, size), axis=0)
