"""The third skeleton: params and a follower of the minimum of inner, by gradients alone."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad._training import inner_optimizers
from unrollgrad.bilevel import _estimator, _losses, data
from unrollgrad.bilevel._double_loop import draw_many, inner_loop
from unrollgrad.bilevel._estimator import Before
from unrollgrad.bilevel._losses import INNER_COST, OUTER_COST, OuterParts, Places, Point
from unrollgrad.bilevel.unrolled import InnerOptimizer
from unrollgrad.implicit import trees
from unrollgrad.types import BilevelInfo, GradientEstimator, Key, MadeBy, Numeric


class FirstOrder(NamedTuple):
    """Where a first-order algorithm stands.

    Attributes:
        params: The params that outer pulls on; they near the minimum of inner as lambda grows.
        v: lambda (follower - params), which stands for the solution of H v = d outer / d params, in
            at least float32.
        follower: The params that follow the minimum of inner alone.
        optimizer: The state of params' optimizer.
        follower_optimizer: The state of the follower's.
        count: int32, the calls so far.
        penalty: lambda of the next call.
        places: The places in the data.
        before: Theta in the call before.
    """

    params: Any
    v: Any
    follower: Any
    optimizer: Any
    follower_optimizer: Any
    count: jax.Array
    penalty: jax.Array
    places: Places
    before: Before


class Penalty(NamedTuple):
    """lambda: the first one and the next one of each, or a schedule of the calls done."""

    first: float
    grown: Callable[[jax.Array, jax.Array], jax.Array]
    schedule: Callable[[jax.Array], Numeric] | None = None


class Method(NamedTuple):
    """The settings of a first-order algorithm; ``kind`` is the variant of its penalty."""

    inner_steps: int
    params_optimizer: InnerOptimizer | None
    penalty: Penalty
    kind: str = "value"


class _Call(NamedTuple):
    """One call: what its rule works with."""

    chosen: _estimator.Settings
    optimizer: inner_optimizers.Optimizer  # params'
    method: Method
    key: Key
    theta: Any
    penalty: jax.Array


class _Moved(NamedTuple):
    """What a rule returns: theta's direction, params' last direction and its updates, the cost."""

    grad: Any
    loss: jax.Array
    rate: jax.Array
    penalty: jax.Array
    gradients: int


def first_order(
    chosen: _estimator.Settings,
    method: Method,
    rule: Callable[[_Call, FirstOrder], tuple[_Moved, FirstOrder]],
) -> GradientEstimator:
    """The skeleton: the bookkeeping around a rule that moves params and follower."""
    arguments.positive_int("inner_steps", method.inner_steps)
    optimizer = chosen.inner_optimizer
    if method.params_optimizer is not None:
        optimizer = _estimator.optimizer("params_optimizer", method.params_optimizer)

    def begin(episode, theta):
        params = _estimator.first_params(chosen, episode, theta)
        return FirstOrder(
            params,
            _losses.widened(jax.tree.map(jnp.zeros_like, params)),
            params,
            _estimator.opened(optimizer, theta, params),
            _estimator.opened(chosen.inner_optimizer, theta, params),
            jnp.zeros((), jnp.int32),
            jnp.float32(method.penalty.first),
            _losses.start(chosen.losses),
            _estimator.before(theta),
        )

    def step(episode, theta, carried):
        schedule, count = method.penalty.schedule, carried.count
        at = count.astype(jnp.float32)
        now = carried.penalty if schedule is None else jnp.float32(schedule(at))
        moved, after = rule(_Call(chosen, optimizer, method, episode.key, theta, now), carried)
        apart = trees.add(_losses.widened(after.follower), _losses.widened(after.params), -1)
        v = trees.scale(moved.penalty, apart)
        info = BilevelInfo(
            inner_steps=jnp.int32(method.inner_steps),
            gradients=jnp.int32(moved.gradients),
            v_norm=_estimator.length(v),
            curvature=jnp.float32(0),
            inner_rate=moved.rate,
            linear_rate=jnp.float32(0),
            outer_rate=_estimator.outer_rate(theta, carried.before),
        )
        after = after._replace(
            v=v,
            count=count + 1,
            penalty=jnp.float32(method.penalty.grown(at, now)),
            before=Before(theta, _estimator.length(moved.grad)),
        )
        return _estimator.estimate_of(moved.grad, theta, moved.loss, info), after

    settings = (("inner_steps", method.inner_steps), ("kind", method.kind))
    return _estimator.forever(MadeBy(chosen.name, settings), chosen.losses, begin, step)


def f2sa_call(call: _Call, carried: FirstOrder) -> tuple[_Moved, FirstOrder]:
    """Steps of both copies, then theta's direction."""
    theta = call.theta
    number, places = call.method.inner_steps, carried.places
    at = carried.follower, carried.follower_optimizer, places
    (follower, state, places), _ = inner_loop(call.chosen, call.key, theta, at, number)

    def step(carry, _):
        params, optimizer, places = carry
        inner, outer, _, places = _gradients(call, params, places)
        direction = trees.add(inner.params, outer.params, 1 / call.penalty)
        params, optimizer, updates = _estimator.moved(
            call.optimizer, theta, direction, optimizer, params
        )
        rate = _estimator.rate(updates, _estimator.length(direction))
        return (params, optimizer, places), rate

    begin = carried.params, carried.optimizer, places
    (params, optimizer, places), rates = jax.lax.scan(step, begin, length=number)
    apart, outer, loss, places = _difference(call, params, follower, places)
    grad = trees.add(outer.theta, apart.theta, call.penalty)
    after = carried._replace(
        params=params,
        optimizer=optimizer,
        follower=follower,
        follower_optimizer=state,
        places=places,
    )
    return _Moved(grad, loss, rates[-1], call.penalty, 3 * number + 3), after


def value_call(call: _Call, carried: FirstOrder) -> tuple[_Moved, FirstOrder]:
    """Steps of the follower, then params and theta along the penalised loss."""
    at = carried.follower, carried.follower_optimizer, carried.places
    number = call.method.inner_steps
    (follower, state, places), _ = inner_loop(call.chosen, call.key, call.theta, at, number)
    apart, outer, loss, places = _difference(call, carried.params, follower, places)
    direction = trees.add(outer.params, apart.params, call.penalty)
    direction = trees.scale(1 / (1 + call.penalty), direction)
    grad = trees.add(outer.theta, apart.theta, call.penalty)
    after, rate = _params_moved(call, carried, direction)
    after = after._replace(follower=follower, follower_optimizer=state, places=places)
    return _Moved(grad, loss, rate, call.penalty, number + 3), after


def gradient_call(call: _Call, carried: FirstOrder) -> tuple[_Moved, FirstOrder]:
    """Params and theta along outer and the penalty on the gradient's norm."""
    losses, theta, params = call.chosen.losses, call.theta, carried.params
    (first, second), places = _two(draw_many(losses, call.key, carried.places, 2))
    token, places = _losses.draw_outer(losses, call.key, places)
    loss, outer = _losses.outer_parts(losses, Point(params, None, theta), token)
    gradient = _losses.inner_gradient(losses, params, theta, first)
    parts = _losses.inner_parts(losses, Point(params, gradient, theta), second)
    direction = trees.add(outer.params, parts.product, 2 * call.penalty)
    direction = trees.scale(1 / (1 + call.penalty), direction)
    grad = trees.add(outer.theta, parts.mixed, 2 * call.penalty)
    after, rate = _params_moved(call, carried, direction)
    after = after._replace(follower=after.params, places=places)
    return _Moved(grad, loss, rate, call.penalty, 1 + INNER_COST + OUTER_COST), after


def bome_call(call: _Call, carried: FirstOrder) -> tuple[_Moved, FirstOrder]:
    """Steps of a fresh follower, then params and theta along outer and lambda dq."""
    chosen, theta, params = call.chosen, call.theta, carried.params
    number = call.method.inner_steps
    at = params, _estimator.opened(chosen.inner_optimizer, theta, params), carried.places
    (follower, state, places), _ = inner_loop(chosen, call.key, theta, at, number)
    apart, outer, loss, places = _difference(call, params, follower, places)
    squares = optax.tree.norm(tuple(apart[:2]), squared=True)
    along = trees.dot(tuple(outer), tuple(apart[:2]))
    phi = call.penalty * (squares if call.method.kind == "norm" else apart.value)
    zero = squares == 0
    weight = jnp.where(zero, 0, jnp.maximum(phi - along, 0) / jnp.where(zero, 1, squares))
    grad = trees.add(outer.theta, apart.theta, weight)
    after, rate = _params_moved(call, carried, trees.add(outer.params, apart.params, weight))
    after = after._replace(follower=follower, follower_optimizer=state, places=places)
    return _Moved(grad, loss, rate, jnp.float32(weight), number + 3), after


class _Apart(NamedTuple):
    """The gradient of inner - inner at the follower, for params and theta, and its value."""

    params: Any
    theta: Any
    value: jax.Array


def _difference(
    call: _Call, params: Any, follower: Any, places: Places
) -> tuple[_Apart, OuterParts, jax.Array, Places]:
    """How params and theta change the suboptimality, on one batch; and outer's gradients."""
    losses, theta = call.chosen.losses, call.theta
    token, places = _losses.draw_inner(losses, call.key, places)

    def gradients(batch):
        here = jax.value_and_grad(losses.inner, argnums=(0, 1))(params, theta, batch)
        there = jax.value_and_grad(losses.inner, argnums=1)(follower, theta, batch)
        return here, there

    (here, there), weight = data.on_batch(losses.inner_data, token, gradients)
    value, (of_params, of_theta) = _losses.weighted(jax.tree.map(jnp.asarray, here), weight)
    at_follower, of_theta_there = _losses.weighted(jax.tree.map(jnp.asarray, there), weight)
    token, places = _losses.draw_outer(losses, call.key, places)
    loss, outer = _losses.outer_parts(losses, Point(params, None, theta), token)
    apart = _Apart(of_params, trees.add(of_theta, of_theta_there, -1), value - at_follower)
    return apart, outer, loss, places


def _gradients(call: _Call, params: Any, places: Places) -> tuple:
    """The gradients of inner (params' alone) and of outer at params, on fresh batches."""
    losses = call.chosen.losses
    token, places = _losses.draw_inner(losses, call.key, places)
    inner = _losses.inner_gradient(losses, params, call.theta, token)
    token, places = _losses.draw_outer(losses, call.key, places)
    loss, outer = _losses.outer_parts(losses, Point(params, None, call.theta), token)
    return OuterParts(inner, None), outer, loss, places


def _params_moved(call: _Call, carried: FirstOrder, direction: Any) -> tuple[FirstOrder, jax.Array]:
    params, state, updates = _estimator.moved(
        call.optimizer, call.theta, direction, carried.optimizer, carried.params
    )
    rate = _estimator.rate(updates, _estimator.length(direction))
    return carried._replace(params=params, optimizer=state), rate


def _two(drawn: tuple[Any, Places]) -> tuple[tuple[Any, Any], Places]:
    tokens, places = drawn
    first, second = (jax.tree.map(lambda x, i=i: x[i], tokens) for i in (0, 1))
    return (first, second), places


def positive(name: str, value: float) -> float:
    """Returns the number; raises ValueError if it is not positive."""
    if not arguments.number(name, value) > 0:
        raise ValueError(f"`{name}` must be positive; got {value}.")
    return value
