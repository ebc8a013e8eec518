"""``uoro`` carries the state's derivative along as a random product of two vectors."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import mesh_axes, unroll
from unrollgrad._core.descriptions import described
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad._core.float_leaves import floats_of, inner_product, split
from unrollgrad.estimators import backprop
from unrollgrad.estimators._window import estimate_of, made_by, windowed
from unrollgrad.types import (
    ArrayTree,
    Episode,
    Estimate,
    GradientEstimator,
    Numeric,
    Segment,
    State,
    Theta,
    UnrolledProblem,
)

__all__ = ["RankOne", "uoro"]


class RankOne(NamedTuple):
    """What a ``uoro`` worker carries: E[``left`` ``right``^T] = d state / d theta.

    Attributes:
        state: The inner state.
        left: One array for each floating leaf of the state, in their order and shapes.
        right: A tree like theta, in at least float32.
    """

    state: State
    left: list[jax.Array]
    right: Theta


@described
def uoro(problem: UnrolledProblem, *, truncation: int) -> GradientEstimator:
    """Unbiased online recurrent optimization: the state's derivative as a random rank-one product.

    Instead of G = d state / d theta the worker carries two vectors with E[left right^T] = G. In
    each step, with random signs v, left <- a (ds'/ds left) + b v and right <- right / a + (v^T
    ds'/dtheta) / b; a and b make both parts equally long, and ``init`` is a part of the first step.
    ``grad`` is the mean over the window's steps of (dloss/dstate . left) right + dloss/dtheta.
    Averaged over an episode's windows it is unbiased for the gradient of J where the step is
    differentiable, ``init`` included. With ``evaluate`` the window adds (T/K) (L_end - L_start),
    differentiated in the same way.

    Variance: high, without a closed form, since the signs disturb every number of the state alike,
    however little the loss depends on it. Prefer ``dodge`` for adaptive optimizers: Adam takes the
    root of a small second moment, and through Adam (an MLP's learning rate, 12 steps) the standard
    deviation over |grad| was 3e7 with b2 = 0.999 and eps_root = 1e-8, 2e4 with b2 = 0.9, 235 with
    eps_root = 1e-2, 1.7 with both, and 1.6 in all four cases with ``dodge``. Time: K steps
    forwards, each with one tangent and two steps back; an episode whose ``init`` depends on theta
    runs its first step once more, which ``info`` does not count. Memory: 2 states + 2 theta and
    what one step computes, whatever the truncation.

    Args:
        problem: The inner loop; its step must be differentiable (it may not contain a
            ``while_loop`` or a ``jax.custom_vjp``), and its state must not be complex.
        truncation: Inner steps per call (K); divides a static horizon.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation is not positive or does not divide the horizon or, in
            ``estimate``, if the step contains a ``while_loop``.
        TypeError: In ``init``, if the state has complex leaves.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.uoro(problem, truncation=10), jax.random.key(0)
        >>> estimate, state = estimator.estimate(key, theta, estimator.init(key, theta))
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
            return _window(segment, theta, carried)

    return windowed(problem, fingerprint, truncation, begin, window)


def _window(segment: Segment, theta: Theta, carried: RankOne) -> tuple[Estimate, RankOne]:
    """Runs one window; its gradient is the mean over its steps, plus what ``evaluate`` adds."""
    problem, episode = segment.problem, segment.episode
    signs = partial(_signs, mesh_axes.axes((theta, episode, carried.state, segment.data)))
    nothing = jax.tree.map(jnp.zeros_like, carried.right)
    begin = partial(_begin, segment, signs)
    first, total = unroll.reset(episode, theta, begin, (carried, nothing))

    def body(carry, key, t, batch):
        def step(theta, state):
            return unroll.one_step(problem, key, theta, state, t, batch)

        before, total = carry
        draw = partial(signs, episode, t)
        after, grad, loss = _advance(step, theta, before, draw, t == 0)
        return (after, jax.tree.map(jnp.add, total, grad)), loss

    (after, total), losses = unroll.scan(segment, body, (first, total))
    grad = jax.tree.map(lambda a: a / segment.num_steps, total)
    loss = jnp.mean(losses)
    if problem.evaluate is not None:
        evaluate = partial(unroll.evaluate, problem, episode)
        end = unroll.weigh(segment, _value_and_grad(evaluate, theta, after))
        start = unroll.weigh(segment, _value_and_grad(evaluate, theta, carried))
        value, slope = jax.tree.map(jnp.subtract, end, unroll.since(segment, start, end))
        loss = loss + value
        grad = jax.tree.map(lambda g, e: g + e.astype(g.dtype), grad, slope)
    grad = jax.tree.map(lambda g, x: g.astype(x.dtype), grad, theta)
    return estimate_of(grad, loss, segment.num_steps), after


def _advance(
    step: Callable[[Theta, State], tuple[State, jax.Array]],
    theta: Theta,
    before: RankOne,
    signs: Callable[[list[jax.Array]], list[jax.Array]],
    first: jax.Array,
) -> tuple[RankOne, Theta, jax.Array]:
    """Takes one inner step: what is carried after it, the gradient of its loss, and its loss.

    In an episode's first step ``before.right`` is not a factor, but ``init``'s part of ``fresh``.
    """
    floats, rebuild = split(before.state)

    def of_floats(theta, floats):
        after, loss = step(theta, rebuild(floats))
        return (floats_of(after), loss), after

    (ends, loss), push, after = jax.linearize(of_floats, theta, floats, has_aux=True)
    back = jax.linear_transpose(push, theta, floats)
    v = signs(ends)
    # The loss's own gradient and the new part of the state's, each by one step back.
    direct, through = back(([jnp.zeros_like(x) for x in ends], jnp.ones_like(loss)))
    fresh, _ = back((v, jnp.zeros_like(loss)))
    pushed, _ = push(jax.tree.map(jnp.zeros_like, theta), before.left)
    held = jax.tree.map(lambda r: jnp.where(first, r, 0), before.right)
    fresh = jax.tree.map(jnp.add, _widened(fresh), held)
    right = jax.tree.map(lambda r: jnp.where(first, 0, r), before.right)
    left, right = _balanced(pushed, right, v, fresh)
    return RankOne(after, left, right), _product(direct, through, before), loss


def _signs(
    names: frozenset, episode: Episode, t: Numeric, floats: list[jax.Array]
) -> list[jax.Array]:
    """Draws the random signs that project the new part of the state's derivative in step ``t``."""
    key = unroll.noise_key(episode, t + 1)
    drawn = [
        jax.random.rademacher(jax.random.fold_in(key, i), x.shape, x.dtype)
        for i, x in enumerate(floats)
    ]
    return mesh_axes.over(names, drawn)


def _begin(
    segment: Segment, signs: Callable, episode: Episode, theta: Theta
) -> tuple[RankOne, Theta]:
    """Begins an episode: the state, and what the first step needs of ``init``'s derivative.

    One v of the first step serves its whole derivative: v^T (ds1/dtheta + ds1/ds0 ds0/dtheta). With
    signs of its own ds0/dtheta would be estimated without bias too, but their products with v would
    add variance to the episode's end.

    Returns:
        What is carried, with the second term in place of ``right``; and the gradient of the first
        loss through ``init``.
    """

    def initial(theta):
        state = unroll.initial_state(segment.problem, episode, theta)
        return floats_of(state), state

    floats, into_theta, state = jax.vjp(initial, theta, has_aux=True)
    _, rebuild = split(state)
    data = jax.tree.map(lambda x: x[:1], segment.data)
    start = segment._replace(episode=episode, num_steps=1, data=data)

    def step(floats):
        after, losses = unroll.unroll(start, theta, rebuild(floats))
        return floats_of(after), losses

    (ends, losses), into_state = jax.vjp(step, floats)
    v = signs(episode, 0, ends)
    none, no_ends, no_losses = jax.tree.map(jnp.zeros_like, (floats, ends, losses))
    held = into_theta(*into_state((v, no_losses)))[0]
    slope = into_theta(*into_state((no_ends, jnp.ones_like(losses))))[0]
    return RankOne(state, none, _widened(held)), _widened(slope)


def _widened(tree: ArrayTree) -> ArrayTree:
    return jax.tree.map(lambda x: x.astype(wide(x.dtype)), tree)


def _product(direct: Theta, through: list[jax.Array], at: RankOne) -> Theta:
    """Computes d loss / d theta where d state / d theta is ``left`` times ``right``."""
    slope = inner_product(through, at.left)
    return jax.tree.map(
        lambda d, r: d.astype(r.dtype) + slope.astype(r.dtype) * r, direct, at.right
    )


def _value_and_grad(
    loss: Callable[[Theta, State], jax.Array], theta: Theta, at: RankOne
) -> tuple[jax.Array, Theta]:
    """The loss of a state, and its derivative in theta, through the state too."""
    floats, rebuild = split(at.state)
    value, (direct, through) = jax.value_and_grad(
        lambda theta, floats: loss(theta, rebuild(floats)), argnums=(0, 1)
    )(theta, floats)
    return value, _product(direct, through, at)


def _balanced(
    pushed: list[jax.Array], right: Theta, v: list[jax.Array], fresh: Theta
) -> tuple[list[jax.Array], Theta]:
    """Joins two rank-one products into one with the same mean, scaled for little variance.

    The guards are those of the paper's code: what is 0 stays 0, and nothing is divided by it.
    """
    tiny = 1e-7

    def ratio(x, y):
        above, below = (optax.tree.norm(_widened(tree)) + tiny for tree in (x, y))
        return jnp.sqrt(above / below)

    a, b = ratio(right, pushed), ratio(fresh, v)
    with standard_promotion():
        left = [(a * p + b * x).astype(p.dtype) for p, x in zip(pushed, v, strict=True)]
        return left, jax.tree.map(lambda r, f: (r / a + f / b).astype(r.dtype), right, fresh)


def _check_real(state: State) -> None:
    """Raises TypeError if the state has complex leaves: real signs would see only one part."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise TypeError(
                f"uoro cannot carry complex states: state{jax.tree_util.keystr(path)} is "
                f"{arguments.describe(x)}. Keep its real and imaginary parts apart, or use `dodge`."
            )
