"""``uoro``: the state's derivative carried along as a random product of two vectors."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import mesh_axes, unroll
from unrollgrad._core.dtypes import wide
from unrollgrad._core.float_leaves import floats_of, inner_product, split
from unrollgrad.estimators import backprop
from unrollgrad.estimators._window import made_by, windowed
from unrollgrad.types import (
    Episode,
    Estimate,
    GradientEstimator,
    Info,
    Segment,
    State,
    Theta,
    UnrolledProblem,
)


class RankOne(NamedTuple):
    """What a ``uoro`` worker carries: d state / d theta is the mean of ``left`` times ``right``.

    Attributes:
        state: The inner state.
        left: Like the state's floating leaves, in their order.
        right: Like theta, in at least float32.
    """

    state: State
    left: list[jax.Array]
    right: Theta


def uoro(problem: UnrolledProblem, *, truncation: int) -> GradientEstimator:
    """Unbiased online recurrent optimization: the state's derivative as a random rank-one product.

    Instead of G = d state / d theta a pair of vectors is carried with E[left right^T] = G. In each
    step, with random signs v, left <- a (ds'/ds left) + b v and right <- right / a + (v^T
    ds'/dtheta) / b; a and b make both parts equally long. ``grad`` = the mean over the window's
    steps of (dloss/dstate . left) right + dloss/dtheta. Averaged over an episode's windows it is
    unbiased for the gradient of J, where the step is differentiable; ``init`` enters in the same
    way. With ``evaluate`` the window adds (T/K) (L_end - L_start), differentiated like that.

    Variance: high, without a closed form, since the signs disturb every number of the state alike,
    whatever it is worth. Adam's small v is under a root: through it the standard deviation over
    |grad| (an MLP's learning rate, 12 steps) was 3e7 with b2 = 0.999 and eps_root = 1e-8, 2e4 with
    b2 = 0.9, 235 with eps_root = 1e-2 and 1.7 with both; 1.6 for ``dodge`` in all four. Prefer that
    for adaptive optimizers. Time: K steps forwards, each with one tangent and two steps back.
    Memory: 2 states + 2 theta and what one step computes, whatever the truncation.

    Args:
        problem: The inner loop; its step must be differentiable (no ``while_loop`` and no
            ``jax.custom_vjp`` in it), and its state not complex.
        truncation: Inner steps per call (K); divides a static horizon.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation is not positive or does not divide the horizon or, when
            estimating, for a ``while_loop`` in the step.
        TypeError: In ``init``, if the state has complex leaves.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.uoro(problem, truncation=10)
        >>> state = estimator.init(jax.random.key(0), theta)
        >>> estimate, state = estimator.estimate(jax.random.key(1), theta, state)
        >>> int(estimate.info.inner_steps), int(state.episode.t)
        (10, 10)

    References:
        Tallec and Ollivier, Unbiased online recurrent optimization, ICLR 2018, arXiv:1702.05043.
    """
    truncation = inner_loop.check_truncation(problem, truncation)
    fingerprint = made_by("uoro", problem, truncation=truncation)

    def begin(episode, theta):
        state = unroll.initial_state(problem, episode, theta)
        _check_real(state)
        left = [jnp.zeros_like(x) for x in floats_of(state)]
        right = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), theta)
        return RankOne(state, left, right)

    def window(segment, theta, carried):
        with backprop.no_while_loop("uoro"):
            return _uoro(segment, theta, carried)

    return windowed(problem, fingerprint, truncation, begin, window)


def _uoro(segment: Segment, theta: Theta, carried: RankOne) -> tuple[Estimate, RankOne]:
    """One window: every step pushes ``left``, pulls its loss back, and joins what is new."""
    problem = segment.problem
    signs = _signs(segment, mesh_axes.axes((theta, segment.episode, carried.state, segment.data)))

    def evaluated(at: RankOne):
        return _rank_one_gradient(partial(unroll.evaluate, problem, segment.episode), theta, at)

    start = None if problem.evaluate is None else evaluated(carried)
    begin = partial(_begin, problem, theta, signs)
    carried = unroll.reset(segment.episode, begin, carried)

    def body(carry, key, t, batch):
        carried, total = carry
        floats, rebuild = split(carried.state)

        def step(theta, floats):
            after, loss = unroll.one_step(problem, key, theta, rebuild(floats), t, batch)
            return (floats_of(after), loss), after

        (ends, loss), push, after = jax.linearize(step, theta, floats, has_aux=True)
        back = jax.linear_transpose(push, theta, floats)
        v = signs(t + 1, ends)
        # The loss's own gradient and the new part of the state's, each by one step back.
        direct, through = back(([jnp.zeros_like(x) for x in ends], jnp.ones_like(loss)))
        fresh, _ = back((v, jnp.zeros_like(loss)))
        pushed, _ = push(jax.tree.map(jnp.zeros_like, theta), carried.left)
        total = jax.tree.map(jnp.add, total, _product(direct, through, carried))
        left, right = _balanced(pushed, carried.right, v, _widened(fresh))
        return (RankOne(after, left, right), total), loss

    total = jax.tree.map(jnp.zeros_like, carried.right)
    (carried, total), losses = unroll.scan(segment, body, (carried, total))
    grad = jax.tree.map(lambda a: a / segment.num_steps, total)
    loss = jnp.mean(losses)
    if problem.evaluate is not None:
        end = unroll.weigh(segment, evaluated(carried))
        start = unroll.since(segment, unroll.weigh(segment, start), end)
        value, slope = jax.tree.map(jnp.subtract, end, start)
        loss = loss + value
        grad = jax.tree.map(lambda g, e: g + e.astype(g.dtype), grad, slope)
    grad = jax.tree.map(lambda g, x: g.astype(x.dtype), grad, theta)
    return Estimate(grad, loss, Info(jnp.int32(segment.num_steps))), carried


def _signs(segment: Segment, names: frozenset) -> Callable[[Any, list], list[jax.Array]]:
    """``signs(t, floats)``: random signs for the state after t steps of the episode."""

    def signs(t, floats):
        key = unroll.noise_key(segment.episode, t)
        return [
            mesh_axes.over(
                names, jax.random.rademacher(jax.random.fold_in(key, i), x.shape, x.dtype)
            )
            for i, x in enumerate(floats)
        ]

    return signs


def _begin(problem: UnrolledProblem, theta: Theta, signs: Callable, episode: Episode) -> RankOne:
    """The start of an episode: what ``init`` does with theta, as a product with random signs."""

    def initial(theta):
        state = unroll.initial_state(problem, episode, theta)
        return floats_of(state), state

    floats, back, state = jax.vjp(initial, theta, has_aux=True)
    v = signs(0, floats)
    right = _widened(back(v)[0])
    none, nothing = [jnp.zeros_like(x) for x in v], jax.tree.map(jnp.zeros_like, right)
    return RankOne(state, *_balanced(none, nothing, v, right))


def _widened(tree: Theta) -> Theta:
    return jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree)


def _product(direct: Theta, through: list[jax.Array], at: RankOne) -> Theta:
    """D loss / d theta where d state / d theta is ``left`` times ``right``."""
    slope = inner_product(through, at.left)
    return jax.tree.map(
        lambda d, r: d.astype(r.dtype) + slope.astype(r.dtype) * r, direct, at.right
    )


def _rank_one_gradient(loss: Callable, theta: Theta, at: RankOne) -> tuple[jax.Array, Theta]:
    """The loss of a state, and d/dtheta of it through the state too."""
    floats, rebuild = split(at.state)
    value, (direct, through) = jax.value_and_grad(
        lambda theta, floats: loss(theta, rebuild(floats)), argnums=(0, 1)
    )(theta, floats)
    return value, _product(direct, through, at)


def _balanced(pushed, right, v, fresh) -> tuple[list[jax.Array], Theta]:
    """Joins two rank-one products into one with the same mean, scaled for little variance.

    The guards are those of the paper's code: what is 0 stays 0, and nothing is divided by it.
    """
    tiny = 1e-7

    def norm(tree):
        return optax.tree.norm(jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree))

    def ratio(a, b):
        return jnp.sqrt((norm(a) + tiny) / (norm(b) + tiny))

    a, b = ratio(right, pushed), ratio(fresh, v)
    left = [(a * p + b * x).astype(p.dtype) for p, x in zip(pushed, v, strict=True)]
    return left, jax.tree.map(lambda r, f: (r / a + f / b).astype(r.dtype), right, fresh)


def _check_real(state: State) -> None:
    """Raises TypeError if the state has complex leaves: real signs would see only half of them."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise TypeError(
                f"uoro cannot carry complex states: state{jax.tree_util.keystr(path)} is "
                f"{arguments.describe(x)}. Keep its real and imaginary parts apart, or use `dodge`."
            )
