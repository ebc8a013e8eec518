"""SOBA and SABA by hand in plain JAX, one ``lax.scan`` each: oracles for timing and for tests.

They are written from the papers' pseudo-code for arrays, with H q = d outer / d params, and draw
batches as a user would: an order of the batches per epoch, a slice of neighbouring rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad.types import Key


class Problem(NamedTuple):
    """Losses, data sets whose rows the batch size divides, first variables, and rates."""

    outer: Callable[..., jax.Array]
    inner: Callable[..., jax.Array]
    outer_data: Any
    inner_data: Any
    batch_size: int
    params: jax.Array
    theta: jax.Array
    inner_rate: float
    outer_rate: float
    shuffle: bool = True


class Reader(NamedTuple):
    """A place in a data set."""

    order: jax.Array
    position: jax.Array
    epoch: jax.Array


def _opened(data: Any, batch_size: int) -> Reader:
    count = len(jax.tree.leaves(data)[0]) // batch_size
    return Reader(jnp.arange(count), jnp.int32(count), jnp.int32(-1))


def _next(reader: Reader, key: Key, shuffle: bool) -> tuple[jax.Array, Reader]:
    """The number of the next batch."""
    count = len(reader.order)

    def turn():
        epoch = reader.epoch + 1
        own = jax.random.fold_in(key, epoch)
        order = jax.random.permutation(own, count) if shuffle else reader.order
        return Reader(order, jnp.int32(0), epoch)

    reader = jax.lax.cond(reader.position == count, turn, lambda: reader)
    return reader.order[reader.position], reader._replace(position=reader.position + 1)


def _rows(data: Any, number: jax.Array, size: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * size, size), data)


def _parts(problem: Problem, z: jax.Array, q: jax.Array, x: jax.Array, i: Any, j: Any) -> Any:
    """The five quantities of batches i and j: inner gradient, H q, Bᵀ q; outer a and b."""
    batch = _rows(problem.inner_data, i, problem.batch_size)
    slope, pull = jax.vjp(lambda z, x: jax.grad(problem.inner)(z, x, batch), z, x)
    product, mixed = pull(q)
    other = _rows(problem.outer_data, j, problem.batch_size)
    return (slope, product, mixed), jax.grad(problem.outer, (0, 1))(z, x, other)


def soba(problem: Problem, key: Key, num_steps: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs SOBA; returns z, q and x."""
    keys = jax.random.split(key)

    def step(carry, _):
        (z, q, x), (first, second) = carry
        i, first = _next(first, keys[0], problem.shuffle)
        j, second = _next(second, keys[1], problem.shuffle)
        (slope, product, mixed), (a, b) = _parts(problem, z, q, x, i, j)
        z = z - problem.inner_rate * slope
        q = q - problem.inner_rate * (product - a)
        x = x - problem.outer_rate * (b - mixed)
        return ((z, q, x), (first, second)), None

    readers = tuple(
        _opened(d, problem.batch_size) for d in (problem.inner_data, problem.outer_data)
    )
    start = (problem.params, jnp.zeros_like(problem.params), problem.theta)
    (end, _), _ = jax.lax.scan(step, (start, readers), length=num_steps)
    return end


def saba(problem: Problem, key: Key, num_steps: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Runs SABA with memories that begin at zero; returns z, q and x."""
    keys = jax.random.split(key)
    start = (problem.params, jnp.zeros_like(problem.params), problem.theta)
    readers = tuple(
        _opened(d, problem.batch_size) for d in (problem.inner_data, problem.outer_data)
    )
    zeros = jax.tree.map(jnp.zeros_like, _parts(problem, *start, jnp.int32(0), jnp.int32(0)))
    tables = tuple(
        jax.tree.map(lambda x, r=r: jnp.zeros((len(r.order), *x.shape), x.dtype), part)
        for part, r in zip(zeros, readers, strict=True)
    )

    def through(memory, new, slot):
        """The SAGA estimate, and the memory with the new part in its slot.

        The last step's part is written now: reading first would make XLA copy the tables.
        """
        table, mean, (waiting, place) = memory
        put = jax.lax.dynamic_update_index_in_dim
        table = jax.tree.map(lambda t, n: put(t, n, place, 0), table, waiting)
        old = jax.tree.map(lambda t: jax.lax.dynamic_index_in_dim(t, slot, 0, False), table)
        count = len(jax.tree.leaves(table)[0])
        found = jax.tree.map(lambda n, o, m: n - o + m, new, old, mean)
        mean = jax.tree.map(lambda n, o, m: m + (n - o) / count, new, old, mean)
        return found, (table, mean, (new, slot))

    def step(carry, _):
        (z, q, x), (first, second), (of_inner, of_outer) = carry
        i, first = _next(first, keys[0], problem.shuffle)
        j, second = _next(second, keys[1], problem.shuffle)
        new = _parts(problem, z, q, x, i, j)
        (slope, product, mixed), of_inner = through(of_inner, new[0], i)
        (a, b), of_outer = through(of_outer, new[1], j)
        z = z - problem.inner_rate * slope
        q = q - problem.inner_rate * (product - a)
        x = x - problem.outer_rate * (b - mixed)
        return ((z, q, x), (first, second), (of_inner, of_outer)), None

    memories = tuple(
        (table, zero, (zero, reader.order[0]))
        for table, zero, reader in zip(tables, zeros, readers, strict=True)
    )
    (end, _, _), _ = jax.lax.scan(step, (start, readers, memories), length=num_steps)
    return end
