"""The second skeleton: inner steps, a linear solve, then theta's direction."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad.bilevel import _estimator, _losses
from unrollgrad.bilevel._estimator import Before
from unrollgrad.bilevel._field import Field, Sample
from unrollgrad.bilevel._linear import Solver, System
from unrollgrad.bilevel._losses import OUTER_COST, PRODUCT_COST, Directions, Losses, Places, Point
from unrollgrad.bilevel.directions import Estimator
from unrollgrad.implicit import trees
from unrollgrad.types import BilevelInfo, GradientEstimator, Key, MadeBy

_TERMS = 4  # folded into an episode's key


class DoubleLoop(NamedTuple):
    """Where a double-loop algorithm stands.

    Attributes:
        params: The inner variable.
        v: The solution of the linear system H v = d outer / d params, in at least float32.
        optimizer: The state of the inner optimizer.
        linear: The state of v's optimizer, if it has one.
        places: The places in the data.
        memory: The memory of the estimator of theta's direction.
        before: Theta in the call before.
    """

    params: Any
    v: Any
    optimizer: Any
    linear: Any
    places: Places
    memory: Any
    before: Before


def double_loop(
    chosen: _estimator.Settings, solver: Solver, inner_steps: int, law: Estimator | None = None
) -> GradientEstimator:
    """Inner steps with fresh batches, a solve at the new params, and the direction from both.

    Without a ``law`` the direction uses the batch of outer that gave the right-hand side; with one,
    fresh batches.
    """
    losses = chosen.losses
    inner_steps = arguments.positive_int("inner_steps", inner_steps)
    fresh = _fresh(losses)

    def begin(episode, theta):
        params = _estimator.first_params(chosen, episode, theta)
        v = _losses.widened(jax.tree.map(jnp.zeros_like, params))
        return DoubleLoop(
            params,
            v,
            _estimator.opened(chosen.inner_optimizer, theta, params),
            solver.init(theta, v),
            _losses.start(losses),
            None if law is None else law.init(fresh, Point(params, v, theta)),
            _estimator.before(theta),
        )

    def step(episode, theta, carried):
        key, places = episode.key, carried.places
        at_start = carried.params, carried.optimizer, places
        (params, state, places), rate = inner_loop(chosen, key, theta, at_start, inner_steps)
        point = Point(params, carried.v, theta)
        token, places = _losses.draw_outer(losses, key, places)
        loss, outer = _losses.outer_parts(losses, point, token)
        coin = coin_of(key, places)
        tokens, places = draw_many(losses, key, places, solver.products)
        system = System(losses, point, outer.params, tokens, coin)
        solved = solver.solve(system, carried.linear)
        point, memory = point._replace(v=solved.v), carried.memory
        if law is None:
            token, places = _losses.draw_inner(losses, key, places)
            mixed = _losses.mixed_product(losses, point, token)
            grad, cost = trees.add(outer.theta, mixed, -1), jnp.int32(PRODUCT_COST)
        else:
            found, places, memory = law.update(fresh, key, point, places, memory)
            grad, cost = found.directions.theta, found.gradients
        info = BilevelInfo(
            inner_steps=jnp.int32(inner_steps),
            gradients=jnp.int32(inner_steps + OUTER_COST + solved.gradients + cost),
            v_norm=_estimator.length(solved.v),
            curvature=solved.curvature,
            inner_rate=rate,
            linear_rate=jnp.float32(solved.rate),
            outer_rate=_estimator.outer_rate(theta, carried.before),
        )
        last = Before(theta, _estimator.length(grad))
        after = DoubleLoop(params, solved.v, state, solved.state, places, memory, last)
        return _estimator.estimate_of(grad, theta, loss, info), after

    label = solver.label if law is None else f"{solver.label}, {law.label}"
    settings = (("inner_steps", inner_steps), ("linear", label))
    return _estimator.forever(MadeBy(chosen.name, settings), chosen.losses, begin, step)


def neumann_field(losses: Losses, solver: Solver) -> Field:
    """Params' direction, and theta's through a Neumann series, all from one draw of batches."""

    def draw(key, places):
        coin = coin_of(key, places)
        outer, places = _losses.draw_outer(losses, key, places)
        inner, places = draw_many(losses, key, places, solver.products + 2)
        return (outer, inner, coin), places

    def value(point, tokens):
        outer_token, inner, coin = tokens
        first, last = (jax.tree.map(lambda x, i=i: x[i], inner) for i in (0, -1))
        gradient = _losses.inner_gradient(losses, point.params, point.theta, first)
        loss, outer = _losses.outer_parts(losses, point, outer_token)
        middle = jax.tree.map(lambda x: x[1:-1], inner)
        solved = solver.solve(System(losses, point, outer.params, middle, coin), None)
        mixed = _losses.mixed_product(losses, point._replace(v=solved.v), last)
        directions = Directions(gradient, None, trees.add(outer.theta, mixed, -1))
        cost = 1 + OUTER_COST + solved.gradients + PRODUCT_COST
        return Sample(directions, loss, solved.v, solved.curvature, cost, solved.rate)

    return Field(draw, value, moves=("params", "theta"))


def _fresh(losses: Losses) -> Field:
    """Theta's direction at given params and v, on one batch of each data set."""

    def draw(key, places):
        inner, places = _losses.draw_inner(losses, key, places)
        outer, places = _losses.draw_outer(losses, key, places)
        return (inner, outer), places

    def value(point, tokens):
        mixed = _losses.mixed_product(losses, point, tokens[0])
        loss, outer = _losses.outer_parts(losses, point, tokens[1])
        directions = Directions(None, None, trees.add(outer.theta, mixed, -1))
        cost = jnp.int32(PRODUCT_COST + OUTER_COST)
        return Sample(directions, loss, None, jnp.float32(0), cost)

    return Field(draw, value, moves=("theta",))


def inner_loop(
    chosen: _estimator.Settings, key: Key, theta: Any, at: tuple, number: int
) -> tuple[tuple, jax.Array]:
    """``number`` inner steps from (params, optimizer state, places); and the last one's rate."""
    params, state, places = at
    tokens, places = draw_many(chosen.losses, key, places, number)

    def step(carry, token):
        params, state = carry
        direction = _losses.inner_gradient(chosen.losses, params, theta, token)
        new, state, updates = _estimator.moved(
            chosen.inner_optimizer, theta, direction, state, params
        )
        return (new, state), _estimator.rate(updates, _estimator.length(direction))

    (params, state), rates = jax.lax.scan(step, (params, state), tokens)
    return (params, state, places), rates[-1]


def draw_many(losses: Losses, key: Key, places: Places, number: int) -> tuple[Any, Places]:
    """The next ``number`` batches of inner."""

    def step(places, _):
        token, places = _losses.draw_inner(losses, key, places)
        return places, token

    places, tokens = jax.lax.scan(step, places, length=number)
    return tokens, places


def coin_of(key: Key, places: Places) -> Key:
    """A key for random numbers beside the batches, which is different in every call."""
    key = jax.random.fold_in(key, _TERMS)
    return jax.random.fold_in(jax.random.fold_in(key, places.inner.epoch), places.inner.position)
