"""SAGA: a memory of every batch's part of the directions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad.bilevel import _field, _losses, data
from unrollgrad.bilevel._losses import InnerParts, OuterParts, Point, widened
from unrollgrad.bilevel.directions import Estimator, check_finite
from unrollgrad.implicit import trees
from unrollgrad.types import ArrayTree

__all__ = ["Memory", "Saga", "saga"]


class Memory(NamedTuple):
    """The memory of one data set: the parts of each of its N batches.

    The last step's parts wait until the next step to be put into the table. So a step writes before
    it reads, and XLA does both in place; the other way round it copies the whole table every time.

    Attributes:
        table: The weighted parts as they were when the batch was drawn last; leading axis N.
        mean: Their mean over the N batches, in at least float32; the waiting parts are in it.
        slot: int32, the batch whose parts wait.
        row: The waiting parts.
    """

    table: Any
    mean: Any
    slot: jax.Array
    row: Any

    def filled(self) -> Any:
        """The table with the waiting parts in it."""
        put = jax.lax.dynamic_update_index_in_dim
        return jax.tree.map(lambda table, x: put(table, x, self.slot, 0), self.table, self.row)


class Saga(NamedTuple):
    """The memories of both data sets."""

    inner: Memory
    outer: Memory


def saga(
    *,
    full_start: bool = False,
    touched: Callable[[Any], ArrayTree] | None = None,
    max_bytes: int = 2**30,
) -> Estimator:
    """SAGA: new parts - the batch's old parts + the mean of all old parts.

    The memory holds, for every batch, the five parts of the directions: d inner / d params, H v and
    B^T v of the inner data, the two gradients of the outer data. Both data sets must be finite
    sums. The estimate is unbiased, and its noise vanishes as the variables settle: with constant
    rates the error on strongly convex problems falls at a linear rate (SABA).

    Cost: one sample. Memory: N_inner (2d + p) + N_outer (d + p) numbers for N batches, params of
    size d and theta of size p, and their means. If a batch of the inner data touches few entries of
    theta, such as the weights of its own rows, ``touched`` names them, and only those are stored.

    Args:
        full_start: Whether ``init`` fills the memory with a pass over all data. Otherwise it begins
            with zeros.
        touched: ``touched(inner_batch)`` returns a tree like theta: for each leaf the indices,
            along its leading axis, of the entries to which B^T v of this batch is confined. They
            must be different from each other, and as many for every full batch; all other entries
            are lost.
        max_bytes: The limit for the memory, checked before it is taken.

    Raises:
        ValueError: In ``init``, if the data are endless, or the memory needs more than
            ``max_bytes``; the message has its size.

    Example:
        >>> import unrollgrad as ug
        >>> ug.bilevel.saga().label
        'saga()'

    References:
        Dagréou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables
        stochastic and global variance reduction algorithms, NeurIPS 2022, arXiv:2201.13409.
    """
    max_bytes = arguments.positive_int("max_bytes", max_bytes)
    if touched is not None:
        trees.check_function("touched", touched)

    def begin(function, number, along):
        """The memory of ``number`` batches with the parts ``function(i)``, or zeros."""
        shapes = jax.eval_shape(function, jnp.int32(0))
        if full_start:
            table = jax.lax.map(function, jnp.arange(number, dtype=jnp.int32))
        else:
            table = jax.tree.map(lambda x: jnp.zeros((number, *x.shape), x.dtype), shapes)
        mean = along(jnp.int32(0), jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
        if full_start:

            def add(i, mean):
                row = jax.tree.map(lambda x: x[i], table)
                return trees.add(mean, along(i, row), 1 / number)

            mean = jax.lax.fori_loop(0, number, add, mean)
        row = jax.tree.map(lambda x: x[0], table)
        return Memory(table, mean, jnp.int32(0), row)

    def init(field, point):
        check_finite(field, "saga")
        parts = _Parts(field.losses, point, touched)
        inner, outer = field.losses.inner_data, field.losses.outer_data
        _check_bytes(parts, max_bytes)
        return Saga(
            begin(parts.inner, inner.num_batches, parts.spread),
            begin(parts.outer, outer.num_batches, _as_it_is),
        )

    def update(field, key, point, places, memory):
        (inner_token, outer_token), places = field.draw(key, places)
        parts = _Parts(field.losses, point, touched)
        inner = parts.inner(inner_token)
        loss, outer = _losses.outer_parts(field.losses, point, outer_token)
        found_inner, inner_memory = _replace(memory.inner, inner_token, inner, parts.spread)
        outer = _narrow_outer(outer, point)
        found_outer, outer_memory = _replace(memory.outer, outer_token, outer, _as_it_is)
        found = _field.sample(point, found_inner, found_outer, loss)
        found = found._replace(curvature=_field.rayleigh(point.v, widened(inner.product)))
        return found, places, Saga(inner_memory, outer_memory)

    return Estimator("saga()", init, update)


class _Parts(NamedTuple):
    """The parts of a batch as they are stored, and back."""

    losses: Any
    point: Point
    touched: Callable[[Any], ArrayTree] | None

    def inner(self, i: jax.Array) -> InnerParts:
        """The parts of inner's batch i, in the dtypes of the variables."""
        parts = _losses.inner_parts(self.losses, self.point, i)
        gradient = trees.narrow(parts.gradient, self.point.params)
        product = trees.narrow(parts.product, self.point.params)
        mixed = trees.narrow(parts.mixed, self.point.theta)
        if self.touched is not None:
            mixed = jax.tree.map(
                lambda x, at: x.at[at].get(mode="fill", fill_value=0), mixed, self.indices(i)
            )
        return InnerParts(gradient, product, mixed)

    def indices(self, i: jax.Array) -> Any:
        """The entries of theta that batch i touches, filled up beyond the end if it is short."""
        source, touched = self.losses.inner_data, self.touched
        assert touched is not None
        full = jax.eval_shape(lambda: touched(data.rows(source, 0, source.batch_size)))

        def filled(x, like):
            end = jnp.iinfo(x.dtype).max
            return jnp.pad(x, (0, len(like) - len(x)), constant_values=end)

        def indices(batch):
            return jax.tree.map(filled, touched(batch), full)

        return data.on_batch(source, i, indices)[0]

    def outer(self, i: jax.Array) -> OuterParts:
        """The parts of outer's batch i."""
        return _narrow_outer(_losses.outer_parts(self.losses, self.point, i)[1], self.point)

    def spread(self, i: jax.Array, parts: InnerParts) -> InnerParts:
        """Stored parts of batch i at full size, in at least float32."""
        parts = widened(parts)
        if self.touched is None:
            return parts
        mixed = jax.tree.map(
            lambda x, at, row: jnp.zeros(x.shape, row.dtype).at[at].set(row, mode="drop"),
            self.point.theta,
            self.indices(i),
            parts.mixed,
        )
        return parts._replace(mixed=mixed)


def _narrow_outer(parts: OuterParts, point: Point) -> OuterParts:
    return OuterParts(
        trees.narrow(parts.params, point.params), trees.narrow(parts.theta, point.theta)
    )


def _replace(memory: Memory, i: jax.Array, new: Any, spread: Callable) -> tuple[Any, Memory]:
    """The estimate from the new parts of batch i, and the memory with them."""
    take, table = jax.lax.dynamic_index_in_dim, memory.filled()
    old = jax.tree.map(lambda table: take(table, i, keepdims=False), table)
    number = len(jax.tree.leaves(table)[0])
    change = spread(i, trees.add(widened(new), widened(old), -1))
    found = trees.add(change, memory.mean)
    mean = trees.add(memory.mean, change, 1 / number)
    return found, Memory(table, mean, i, new)


def _as_it_is(i: jax.Array, parts: Any) -> Any:
    """Stored parts of a batch of outer at full size."""
    return widened(parts)


def _check_bytes(parts: _Parts, max_bytes: int) -> None:
    """Raises ValueError if the tables need more than ``max_bytes``."""
    sizes = []
    for function, source in (
        (parts.inner, parts.losses.inner_data),
        (parts.outer, parts.losses.outer_data),
    ):
        shapes = jax.eval_shape(function, jnp.int32(0))
        row = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        sizes.append((source.num_batches, row))
    need = sum(number * row for number, row in sizes)
    if need > max_bytes:
        each = " and ".join(f"{number} batches of {row} bytes" for number, row in sizes)
        raise ValueError(
            f"saga needs {need / 2**20:.4g} MiB for its memory ({each}, inner and outer); "
            f"`max_bytes` allows {max_bytes / 2**20:.4g} MiB. Use larger batches, `touched` if a "
            "batch touches few entries of theta, sarah or page, which keep no memory per batch, or "
            "raise max_bytes."
        )
