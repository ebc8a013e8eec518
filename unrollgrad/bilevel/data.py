"""Where the stochastic algorithms get their batches: a finite sum, or an endless sampler."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes
from unrollgrad.types import ArrayTree, Key, Numeric

__all__ = [
    "FiniteSum",
    "Place",
    "bad_rows",
    "check_source",
    "draw",
    "example",
    "finite_sum",
    "on_batch",
    "rows",
    "start",
]


class FiniteSum(NamedTuple):
    """A data set in mini-batches of neighbouring rows; ``finite_sum`` makes it.

    Attributes:
        arrays: A pytree of arrays with the rows along the leading axis.
        num_examples: The number of rows.
        batch_size: The rows of every batch but the last, which may have fewer.
        shuffle: Whether each epoch visits the batches in a new random order.
    """

    arrays: Any
    num_examples: int
    batch_size: int
    shuffle: bool

    @property
    def num_batches(self) -> int:
        """The number of batches in an epoch."""
        return -(-self.num_examples // self.batch_size)

    @property
    def tail(self) -> int:
        """The rows of the last batch if it is short, else 0."""
        return self.num_examples % self.batch_size


Source = FiniteSum | Callable[..., Any]
"""A finite sum, or ``sample_batch(key)``."""


class Place(NamedTuple):
    """A reader's place in its data.

    Attributes:
        epoch: int32, the number of the epoch; -1 before the first one.
        position: int32, the batches read in this epoch (of an endless sampler: in all).
        order: int32, the order of this epoch's batches; None if they are not shuffled.
    """

    epoch: jax.Array
    position: jax.Array
    order: jax.Array | None


def finite_sum(arrays: ArrayTree, batch_size: int, shuffle: bool = True) -> FiniteSum:
    """A data set on the device, read in mini-batches, each once per epoch.

    Batch j is rows j batch_size to (j + 1) batch_size: neighbours, so that reading one copies no
    other row, and a memory per batch (``saga``) has a meaning. Rows that are sorted, by class for
    example, should be permuted once before. If batch_size does not divide the number n of rows, the
    last batch is short. With N batches, the mean over the n_j rows of batch j counts N n_j / n
    times, so that the mean over an epoch is the mean over all rows.

    Memory: the arrays themselves, no copy.

    Args:
        arrays: A pytree of arrays with the n rows along the leading axis. They may be sharded over
            a mesh.
        batch_size: Rows per batch; n of them make one batch of everything.
        shuffle: Whether each epoch draws a new order of its batches. Otherwise they come in file
            order.

    Raises:
        TypeError: If a leaf does not consist of numbers.
        ValueError: If there are no arrays or no rows, the leading axes differ, or batch_size is not
            in 1..n.

    Example:
        >>> import jax.numpy as jnp, unrollgrad as ug
        >>> data = ug.bilevel.finite_sum({"x": jnp.ones((10, 3)), "y": jnp.ones(10)}, 4)
        >>> data.num_batches, data.tail
        (3, 2)
    """
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    if not leaves:
        raise ValueError(f"`arrays` has no arrays; got {arrays!r}. Pass the rows of the data.")
    (first, leading), *_ = leaves
    size = np.shape(leading)[0] if np.ndim(leading) else 0
    for path, leaf in leaves:
        if np.ndim(leaf) == 0 or np.shape(leaf)[0] != size:
            names = [
                f"arrays{jax.tree_util.keystr(p)} is {arguments.describe(x)}"
                for p, x in ((first, leading), (path, leaf))
            ]
            raise ValueError(
                "all `arrays` must have the same leading axis, one row per example; "
                f"{' and '.join(dict.fromkeys(names))}. "
                + ("Cut them to the same rows." if np.ndim(leaf) else _NO_AXIS)
            )
    if size == 0:
        raise ValueError(f"`arrays` has no rows; got {arguments.describe(leading)}.")
    batch_size = arguments.positive_int("batch_size", batch_size)
    if batch_size > size:
        raise ValueError(
            f"`batch_size`={batch_size} is more than the {size} rows of `arrays`; use at most "
            f"{size}."
        )
    arrays = jax.tree_util.tree_map_with_path(_numbers, arrays)
    return FiniteSum(arrays, int(size), batch_size, bool(shuffle))


_NO_AXIS = (
    "A number has no rows: pass arrays in place of lists of numbers, and let the losses close over "
    "what is not per example."
)


def _numbers(path: Any, leaf: Any) -> jax.Array:
    """The array on the device; raises TypeError if it is not one of numbers."""
    try:
        return jnp.asarray(leaf)
    except TypeError as error:
        raise TypeError(
            f"`arrays`{jax.tree_util.keystr(path)} must be an array of numbers; got "
            f"{arguments.describe(leaf)}."
        ) from error


def bad_rows(name: str, source: Source) -> str:
    """Says which rows of a finite sum are not finite; an empty text if none is."""
    if not isinstance(source, FiniteSum):
        return ""
    told = []
    for path, x in jax.tree_util.tree_leaves_with_path(source.arrays):
        if not jnp.issubdtype(x.dtype, jnp.inexact) or not getattr(x, "is_fully_addressable", True):
            continue
        rows = np.flatnonzero(~np.isfinite(np.asarray(x)).reshape(len(x), -1).all(1))
        if len(rows):
            first = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
            where = f"arrays{jax.tree_util.keystr(path)}"
            told.append(f"{len(rows)} of the {len(x)} rows in {where}, number {first}")
    if not told:
        return ""
    return f"`{name}` has rows with NaN or infinity: {'; '.join(told)}. Take them out."


def check_source(name: str, source: object) -> None:
    """Raises TypeError if ``source`` is neither a finite sum nor a sampler."""
    if not isinstance(source, FiniteSum) and not callable(source):
        raise TypeError(
            f"`{name}` must be bilevel.finite_sum(arrays, batch_size) or a function "
            f"sample_batch(key); got {arguments.describe(source)}."
        )


def start(source: Source) -> Place:
    """The place before the first batch."""
    zero = jnp.zeros((), jnp.int32)
    if not isinstance(source, FiniteSum):
        return Place(zero, zero, None)
    order = jnp.arange(source.num_batches, dtype=jnp.int32) if _shuffled(source) else None
    return Place(zero - 1, zero + source.num_batches, order)


def draw(source: Source, key: Key, place: Place, stream: int = 0) -> tuple[Any, Place]:
    """Returns what names the next batch (its number, or its key), and the place after it.

    Readers that share ``key`` have streams of their own.
    """
    if not isinstance(source, FiniteSum):
        own = jax.random.fold_in(jax.random.fold_in(key, stream), place.position)
        return own, place._replace(position=place.position + 1)
    place = _turned(source, key, place, stream)
    token = place.position if place.order is None else place.order[place.position]
    return token, place._replace(position=place.position + 1)


def _shuffled(source: FiniteSum) -> bool:
    return source.shuffle and source.num_batches > 1


def _turned(source: FiniteSum, key: Key, place: Place, stream: int) -> Place:
    """The place in the next epoch, if this one is over.

    The order is drawn in a loop that runs zero or one time: drawing it in every step would sort all
    batches every time, and a ``cond`` under ``vmap`` does. The key takes part in the loop through a
    barrier, so that XLA does not move what depends on it alone, the stream's key, out of the loop
    and into every step.
    """
    over = place.position >= source.num_batches
    if place.order is None:
        epoch = jnp.where(over, place.epoch + 1, place.epoch)
        return Place(epoch, jnp.where(over, 0, place.position), None)
    names, impl = mesh_axes.axes((key, place)), jax.random.key_impl(key)
    given = jax.random.key_data(key)

    def turn(carry):
        waiting, epoch, _ = carry
        waiting, words = jax.lax.optimization_barrier((waiting, given))
        own = jax.random.fold_in(jax.random.wrap_key_data(words, impl=impl), stream)
        own = jax.random.fold_in(own, epoch + 1)
        order = jnp.arange(source.num_batches, dtype=jnp.int32)
        order = mesh_axes.over(names, jax.random.permutation(own, order))
        return jnp.zeros_like(waiting), epoch + 1, order

    carry = mesh_axes.over(names, (over, place.epoch, place.order))
    _, epoch, order = jax.lax.while_loop(lambda carry: carry[0], turn, carry)
    return Place(epoch, jnp.where(over, 0, place.position), order)


def on_batch(source: Source, token: Any, function: Callable[[Any], Any]) -> tuple[Any, Numeric]:
    """``function(batch)`` of the batch that ``token`` names, and the weight of that batch.

    The weighted values have the mean over all rows as their mean over an epoch.
    """
    if not isinstance(source, FiniteSum):
        return function(source(token)), 1.0
    own = functools.partial(rows, source)
    if not source.tail:
        return function(own(token, source.batch_size)), 1.0
    last = token == source.num_batches - 1
    values = jax.lax.cond(
        last,
        lambda: function(own(source.num_batches - 1, source.tail)),
        lambda: function(own(token, source.batch_size)),
    )
    short, full = (
        source.num_batches * n / source.num_examples for n in (source.tail, source.batch_size)
    )
    return values, jnp.where(last, short, full)


def example(source: Source, key: Key) -> Any:
    """Some batch."""
    return rows(source, 0, source.batch_size) if isinstance(source, FiniteSum) else source(key)


def rows(source: FiniteSum, number: Numeric, size: int) -> Any:
    """The first ``size`` rows of a batch."""
    begin = number * source.batch_size
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, begin, size), source.arrays)
