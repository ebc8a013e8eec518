"""A field of directions that batches sample: the contract between algorithms and estimators.

``soba``'s three directions, or a hypergradient by a Neumann series, are a ``Field``; ``sgd``,
``saga``, ``storm`` and the others estimate its mean over the data from samples.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._core import mesh_axes
from unrollgrad.bilevel import _losses, data
from unrollgrad.bilevel._losses import Directions, InnerParts, Losses, OuterParts, Places, Point
from unrollgrad.implicit import trees
from unrollgrad.types import ArrayTree, Key, Numeric


class Sample(NamedTuple):
    """A field at one point and one draw of batches, or an estimate of its mean.

    Attributes:
        directions: The directions.
        loss: outer on the batch.
        v: The solution of the linear system, where the field solves it; else None.
        curvature: The Rayleigh quotient v^T H v / v^T v of the batch, 0 where v is 0.
        gradients: int32, the cost in gradients of one batch.
        rate: That of the solution's series, if the field solves.
    """

    directions: Directions
    loss: jax.Array
    v: Any
    curvature: jax.Array
    gradients: Numeric
    rate: Numeric = 0.0


class Field(NamedTuple):
    """Directions that a draw of batches samples.

    Attributes:
        draw: ``draw(key, places) -> (tokens, places)`` names the batches of one sample.
        value: ``value(point, tokens) -> Sample``.
        losses: The two losses, if the directions are sums of ``inner_parts`` and ``outer_parts``
            (``combined``): ``saga`` and full passes need that. Else None.
        moves: The variables that have a direction.
    """

    draw: Callable[[Key, Places], tuple[Any, Places]]
    value: Callable[[Point, Any], Sample]
    losses: Losses | None = None
    moves: tuple[str, ...] = Point._fields

    def zeros(self, point: Point) -> Directions:
        """Directions of zeros, in at least float32."""

        def like(name):
            tree = jax.tree.map(jnp.zeros_like, getattr(point, name))
            return _losses.widened(tree) if name in self.moves else None

        return Directions(*map(like, Point._fields))


def single_loop(losses: Losses) -> Field:
    """The field of ``soba``: all three directions from one batch of each data set."""

    def draw(key, places):
        inner, places = _losses.draw_inner(losses, key, places)
        outer, places = _losses.draw_outer(losses, key, places)
        return (inner, outer), places

    def value(point, tokens):
        inner = _losses.inner_parts(losses, point, tokens[0])
        loss, outer = _losses.outer_parts(losses, point, tokens[1])
        return sample(point, inner, outer, loss)

    return Field(draw, value, losses)


def sample(point: Point, inner: InnerParts, outer: OuterParts, loss: jax.Array) -> Sample:
    """The sample that one draw's parts make."""
    cost = _losses.INNER_COST + _losses.OUTER_COST
    curvature = rayleigh(point.v, inner.product)
    return Sample(combined(inner, outer), loss, None, curvature, jnp.int32(cost))


def combined(inner: InnerParts, outer: OuterParts) -> Directions:
    """The three directions; linear in the parts."""
    return Directions(
        inner.gradient,
        trees.add(inner.product, outer.params, -1),
        trees.add(outer.theta, inner.mixed, -1),
    )


def rayleigh(v: ArrayTree, product: ArrayTree) -> jax.Array:
    """v^T H v / v^T v; 0 where v is 0."""
    squares = jnp.float32(optax.tree.norm(v, squared=True))
    zero = squares == 0
    return jnp.where(zero, 0, jnp.float32(trees.dot(v, product)) / jnp.where(zero, 1, squares))


def whole(field: Field, point: Point, when: jax.Array) -> tuple[Directions, jax.Array]:
    """The mean of the field over all data where ``when``, else zeros; and what it cost.

    A loop that runs zero times or once per batch: under ``vmap`` no replica pays for a pass unless
    one of them makes it.
    """
    losses = field.losses
    assert losses is not None
    inner_data, outer_data = losses.inner_data, losses.outer_data
    assert isinstance(inner_data, data.FiniteSum)
    assert isinstance(outer_data, data.FiniteSum)
    inner = _mean(lambda i: _losses.inner_parts(losses, point, i), inner_data.num_batches, when)
    outer = _mean(lambda i: _losses.outer_parts(losses, point, i)[1], outer_data.num_batches, when)
    cost = inner_data.num_batches * _losses.INNER_COST + outer_data.num_batches
    return combined(inner, outer), jnp.where(when, jnp.int32(cost), 0)


def several(
    field: Field, key: Key, point: Point, places: Places, times: jax.Array, most: int
) -> tuple[Directions, jax.Array, Places]:
    """The mean of ``most`` fresh samples if ``times`` is that, zeros if it is 0; and its cost."""
    zeros = zeros_of(lambda: field.value(point, field.draw(key, places)[0]).directions)

    def body(_, carry):
        total, cost, places = carry
        tokens, places = field.draw(key, places)
        found = field.value(point, tokens)
        return trees.add(total, found.directions, 1 / most), cost + found.gradients, places

    return jax.lax.fori_loop(0, times, body, (zeros, jnp.int32(0), places))


def _mean(function: Callable[[jax.Array], Any], number: int, when: jax.Array) -> Any:

    def body(i, total):
        return trees.add(total, function(i), 1 / number)

    zeros = zeros_of(lambda: function(jnp.int32(0)))
    return jax.lax.fori_loop(0, jnp.where(when, number, 0), body, zeros)


def zeros_of(function: Callable[[], Any]) -> Any:
    """Zeros like what ``function`` returns, which does not run."""
    shapes = jax.eval_shape(function)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return mesh_axes.like(shapes, zeros)
