"""What BSVRB does with one sampled block."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from unrollgrad.bilevel import _estimator, _field, _losses, data
from unrollgrad.bilevel._losses import OUTER_COST, PRODUCT_COST, Losses, Places, Point
from unrollgrad.implicit import trees
from unrollgrad.types import ArrayTree, Key, Numeric, Theta

_BLOCKS = 5  # folded into an episode's key


class Rows(NamedTuple):
    """What is kept for a block beside params and v.

    Attributes:
        direction: The direction s of params.
        linear: The direction u of v, or the Hessian matrix.
        optimizer: The state of params' optimizer.
        linear_optimizer: The state of v's.
    """

    direction: Any
    linear: Any
    optimizer: Any
    linear_optimizer: Any


class Last(NamedTuple):
    """The blocks that the last step sampled, and where they stood before it moved them.

    The others have not moved since, so nothing else of the past is kept per block.
    """

    index: jax.Array
    params: Any
    v: Any

    def rows(self, index: jax.Array, count: jax.Array, now: tuple) -> tuple:
        """Params and v of the blocks ``index`` a step ago; ``now`` is where they stand."""
        same = index[:, None] == self.index[None]
        just, place = jnp.any(same, 1) & (count > 0), jnp.argmax(same, 1)

        def leaf(old, new):
            chosen = just.reshape(-1, *[1] * (new.ndim - 1))
            return jnp.where(chosen, old[place], new)

        return jax.tree.map(leaf, (self.params, self.v), now)


class Tracking(NamedTuple):
    """How the directions are tracked; the fields are arguments of ``bsvrb``."""

    tracks: str
    alpha: float
    gamma: Numeric
    radius: Numeric | None
    least_curvature: Numeric
    catch_up: bool


class Found(NamedTuple):
    """What a visit finds: new directions to keep, theta's direction at both points, and more."""

    direction: Any
    linear: Any
    v: Any
    new: Any
    old: Any
    loss: jax.Array
    curvature: jax.Array
    gradients: Numeric


def losses_of(losses: Losses, i: jax.Array) -> Losses:
    """The losses and samplers of block i."""

    def loss(function):
        return lambda params, theta, batch: function(params, theta, batch, i)

    def source(given):
        if isinstance(given, data.FiniteSum) or not _takes_block(given):
            return given
        return lambda key: given(key, i)

    return Losses(
        loss(losses.outer),
        loss(losses.inner),
        source(losses.outer_data),
        source(losses.inner_data),
    )


def _takes_block(sampler: Callable) -> bool:
    """Whether ``sampler(key, i)`` is possible."""
    try:
        inspect.signature(sampler).bind(None, None)
    except TypeError:
        return False
    return True


def subset(key: Key, count: jax.Array, blocks: int, sampled: int) -> jax.Array:
    """A uniform subset of the blocks; its cost does not grow with the blocks there are.

    Floyd's algorithm: for j = blocks - sampled, ..., blocks - 1, draw t from 0..j, and take t, or j
    if t was taken before.
    """
    if sampled == blocks:
        return jnp.arange(blocks, dtype=jnp.int32)
    key = jax.random.fold_in(jax.random.fold_in(key, _BLOCKS), count)
    last = jnp.arange(blocks - sampled, blocks, dtype=jnp.int32)
    drawn = jax.random.randint(key, (sampled,), 0, last + 1, jnp.int32)

    def take(taken, pair):
        place, drawn, last = pair
        new = jnp.where(jnp.any(taken == drawn), last, drawn)
        return taken.at[place].set(new), None

    places = jnp.arange(sampled, dtype=jnp.int32)
    start = jnp.zeros_like(drawn) - 1
    return jax.lax.scan(take, start, (places, drawn, last))[0]


def draws(losses: Losses, key: Key, places: Places, number: int) -> tuple[Any, Places]:
    """One batch of each data set per sampled block."""

    def step(places, _):
        inner, places = _losses.draw_inner(losses, key, places)
        outer, places = _losses.draw_outer(losses, key, places)
        return places, (inner, outer)

    places, tokens = jax.lax.scan(step, places, length=number)
    return tokens, places


def visit(losses: Losses, tracking: Tracking, at: tuple, tokens: Any, row: tuple) -> Found:
    """Samples a block's directions at the new and at the old point, and updates the tracked ones.

    Args:
        losses: The block's own.
        tracking: The settings.
        at: theta, and the theta of the step before.
        tokens: The batches of inner and outer.
        row: params and v of the block, those of a step ago, its ``Rows``, and whether this is its
            first visit.
    """
    (theta, old_theta), ((params, v), (old_params, old_v), kept, first) = at, row
    points = Point(params, v, theta), Point(old_params, old_v, old_theta)
    if tracking.tracks == "products":
        new, old = (_field.single_loop(losses).value(point, tokens) for point in points)
        linear = _tracked(tracking, first, kept.linear, new.directions.v, old.directions.v)
        direction = _tracked(
            tracking, first, kept.direction, new.directions.params, old.directions.params
        )
        cost = new.gradients + old.gradients
        thetas = new.directions.theta, old.directions.theta
        return Found(direction, linear, v, *thetas, new.loss, new.curvature, cost)
    hessians = [_hessian(losses, point, tokens[0]) for point in points]
    linear = _tracked(tracking, first, kept.linear, *hessians)
    linear = _at_least(linear, tracking.least_curvature)
    # In its first visit a block has no older Hessian.
    matrices = linear, jnp.where(first, linear, kept.linear)
    gradients = [
        _losses.inner_gradient(losses, point.params, point.theta, tokens[0]) for point in points
    ]
    new, old = _solved(losses, points, tokens, matrices)
    direction = _tracked(tracking, first, kept.direction, *gradients)
    size = len(linear)
    cost = jnp.int32(2 * (1 + PRODUCT_COST * size + OUTER_COST + PRODUCT_COST))
    flat = ravel_pytree(new.v)[0]
    curvature = _field.rayleigh(flat, linear @ flat)
    return Found(direction, linear, new.v, new.theta, old.theta, new.loss, curvature, cost)


class _Solved(NamedTuple):
    """v from a Hessian matrix, and what follows from it."""

    v: Any
    theta: Any
    loss: jax.Array


def _solved(
    losses: Losses, points: tuple[Point, ...], tokens: Any, matrices: tuple[jax.Array, ...]
) -> list[_Solved]:
    """The solutions at the points, by one call of LAPACK.

    Two calls that do not depend on each other, and that ``vmap`` batches, may run at once on a CPU;
    each then waits for threads of the pool that the other holds, and with two cores both wait for
    ever (jaxlib 0.10).
    """
    parts = [_losses.outer_parts(losses, point, tokens[1]) for point in points]
    back = ravel_pytree(points[0].v)[1]
    right = jnp.stack([ravel_pytree(outer.params)[0] for _, outer in parts])
    solutions = jnp.linalg.solve(jnp.stack(matrices), right[..., None])[..., 0]
    found = []
    for point, (loss, outer), flat in zip(points, parts, solutions, strict=True):
        point = point._replace(v=back(flat))
        mixed = _losses.mixed_product(losses, point, tokens[0])
        found.append(_Solved(point.v, trees.add(outer.theta, mixed, -1), loss))
    return found


def _hessian(losses: Losses, point: Point, token: Any) -> jax.Array:
    flat, back = ravel_pytree(point.v)

    def row(unit):
        product = _losses.hessian_product(losses, point._replace(v=back(unit)), token)
        return ravel_pytree(product)[0]

    return jax.vmap(row)(jnp.eye(flat.size, dtype=flat.dtype))


def _at_least(matrix: jax.Array, least: Numeric) -> jax.Array:
    values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * jnp.maximum(values, least)) @ vectors.T


def _tracked(tracking: Tracking, first: jax.Array, kept: Any, new: Any, old: Any) -> Any:
    """(1 - alpha) kept + alpha new + gamma (new - old); ``new`` itself in a first visit."""
    alpha, gamma = tracking.alpha, tracking.gamma

    def leaf(kept, new, old):
        moved = (1 - alpha) * kept + (alpha + gamma) * new - gamma * old
        return jnp.where(first, new, moved.astype(new.dtype))

    return jax.tree.map(leaf, kept, new, old)


def move(
    optimizers: tuple, tracking: Tracking, theta: Theta, row: tuple, found: Found
) -> tuple[tuple, tuple[jax.Array, jax.Array]]:
    """A block's step along the tracked directions: its new row, and the rates of params and v."""
    (params, v), kept, late = row
    late = late.astype(jnp.float32) if tracking.catch_up else 1.0
    new, optimizer, updates = _moved(
        optimizers[0], theta, late, found.direction, (kept.optimizer, params)
    )
    rate = _estimator.rate(updates, _estimator.length(found.direction))
    linear_optimizer, new_v, linear_rate = kept.linear_optimizer, found.v, jnp.float32(0)
    if tracking.tracks == "products":
        new_v, linear_optimizer, along = _moved(
            optimizers[1], theta, late, found.linear, (linear_optimizer, v)
        )
        linear_rate = _estimator.rate(along, _estimator.length(found.linear))
        new_v = _within(new_v, tracking.radius)
    kept = Rows(found.direction, found.linear, optimizer, linear_optimizer)
    return (new, new_v, kept), (rate, linear_rate)


def _moved(optimizer, theta: Theta, late: Numeric, direction: ArrayTree, held: tuple) -> tuple:
    """``_estimator.moved`` with the updates multiplied by ``late``."""
    state, variable = held
    _, state, updates = _estimator.moved(optimizer, theta, direction, state, variable)
    updates = trees.scale(late, updates)
    return trees.add(variable, updates), state, updates


def _within(v: Any, radius: Numeric | None) -> Any:
    """The nearest tree whose norm is at most ``radius``."""
    if radius is None:
        return v
    norm = optax.tree.norm(v)
    return trees.scale(jnp.where(norm > radius, radius / norm, 1), v)
