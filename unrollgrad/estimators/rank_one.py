"""``uoro``: the state's derivative carried along as a random product of two vectors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad import checks, problem_checks, unroll, varying
from unrollgrad.estimators import backprop, worker
from unrollgrad.estimators.floats import floats_of, inner_product, split
from unrollgrad.noise import wide
from unrollgrad.types import (
    Episode,
    Estimate,
    GradientEstimator,
    Info,
    Key,
    State,
    Theta,
    UnrolledProblem,
)


class RankOneState(NamedTuple):
    """The state of a ``uoro`` worker: d state / d theta is the mean of ``left`` times ``right``.

    Attributes:
        episode: Where it stands.
        state: The inner state.
        left: Like the state's floating leaves, in their order.
        right: Like theta, in at least float32.
        made_by: The estimator whose it is.
    """

    episode: Episode
    state: State
    left: list[jax.Array]
    right: Theta
    made_by: worker.MadeBy


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
    truncation = problem_checks.check_truncation(problem, truncation)
    made_by = worker.made_by("uoro", problem, truncation=truncation)

    def init(key: Key, theta: Theta) -> RankOneState:
        mean = worker.init_mean(problem, key, theta, truncation, made_by)
        _check_real(mean.state)
        left = [jnp.zeros_like(x) for x in floats_of(mean.state)]
        right = jax.tree.map(
            lambda x: jnp.zeros(x.shape, wide(x.dtype)), checks.floating_theta(theta)
        )
        left, right = varying.over(varying.axes((key, theta)), (left, right))
        return RankOneState(mean.episode, mean.state, left, right, made_by)

    def estimate(key: Key, theta: Theta, state: RankOneState, *, data: Any = None):
        key, theta = worker.admit(problem, init, key, theta, state, data, truncation, "truncation")
        with backprop.no_while_loop("uoro"):
            return _uoro(problem, truncation, made_by, key, theta, state, data)

    return worker.compiled(init, estimate, truncation)


def _uoro(problem, truncation, made_by, key, theta, state, data):
    episode = unroll.continue_or_begin(problem, key, state.episode, truncation)
    names = varying.axes((theta, episode, state.state, data))

    def signs(t, floats):
        """Random signs for the state after t steps, the start of the episode being t = 0."""
        key = unroll.noise_key(episode, t)
        return [
            varying.over(names, jax.random.rademacher(jax.random.fold_in(key, i), x.shape, x.dtype))
            for i, x in enumerate(floats)
        ]

    def begin(episode):
        def initial(theta):
            state = unroll.initial_state(problem, episode, theta)
            return floats_of(state), state

        floats, back, start = jax.vjp(initial, theta, has_aux=True)
        v = signs(0, floats)
        right = jax.tree.map(lambda g: g.astype(wide(g.dtype)), back(v)[0])
        none, nothing = [jnp.zeros_like(x) for x in v], jax.tree.map(jnp.zeros_like, right)
        return start, *_balanced(none, nothing, v, right)

    carried = state.state, state.left, state.right
    at_start = None
    if problem.evaluate is not None:
        at_start = _rank_one_gradient(
            lambda theta, s: unroll.evaluate(problem, episode, theta, s), theta, *carried
        )
    inner, left, right = unroll.reset(episode, begin, carried)
    step_key = unroll.step_key(episode)

    def body(carry, inputs):
        i, batch = inputs
        t = episode.t + i
        inner, left, right, total = carry
        floats, rebuild = split(inner)

        def step(theta, floats):
            after, loss = unroll.one_step(problem, step_key, theta, rebuild(floats), t, batch)
            return (floats_of(after), loss), after

        (ends, loss), push, after = jax.linearize(step, theta, floats, has_aux=True)
        back = jax.linear_transpose(push, theta, floats)
        v = signs(t + 1, ends)
        # The loss's own gradient and the new part of the state's, each by one step back.
        direct, through = back(([jnp.zeros_like(x) for x in ends], jnp.ones_like(loss)))
        fresh, _ = back((v, jnp.zeros_like(loss)))
        pushed, _ = push(jax.tree.map(jnp.zeros_like, theta), left)
        slope = inner_product(through, left)
        total = jax.tree.map(
            lambda a, d, r: a + d.astype(a.dtype) + slope.astype(a.dtype) * r.astype(a.dtype),
            total,
            direct,
            right,
        )
        fresh = jax.tree.map(lambda g: g.astype(wide(g.dtype)), fresh)
        left, right = _balanced(pushed, right, v, fresh)
        return (after, left, right, total), loss

    total = jax.tree.map(lambda r: jnp.zeros_like(r), right)
    inputs = (jnp.arange(truncation, dtype=jnp.int32), data)
    (inner, left, right, total), losses = jax.lax.scan(body, (inner, left, right, total), inputs)
    grad = jax.tree.map(lambda a: a / truncation, total)
    loss = jnp.mean(losses)
    if at_start is not None:
        scale = problem_checks.static_horizon(problem, "problem.evaluate") / truncation
        at_end = _rank_one_gradient(
            lambda theta, s: unroll.evaluate(problem, episode, theta, s), theta, inner, left, right
        )
        first = episode.t == 0
        grad = jax.tree.map(
            lambda g, e, s: g + scale * (e - jnp.where(first, 0, s)).astype(g.dtype),
            grad,
            at_end[1],
            at_start[1],
        )
        loss = loss + scale * (at_end[0] - jnp.where(first, 0, at_start[0]))
    grad = jax.tree.map(lambda g, x: g.astype(x.dtype), grad, theta)
    out = Estimate(grad, loss, Info(jnp.int32(truncation)))
    episode = unroll.advance(episode, truncation)
    return out, RankOneState(episode, inner, left, right, made_by)


def _rank_one_gradient(loss, theta, state, left, right) -> tuple[jax.Array, Theta]:
    """The loss, and d/dtheta of it where d state / d theta is ``left`` times ``right``."""
    floats, rebuild = split(state)
    value, (direct, through) = jax.value_and_grad(
        lambda theta, floats: loss(theta, rebuild(floats)), argnums=(0, 1)
    )(theta, floats)
    slope = inner_product(through, left)
    return value, jax.tree.map(
        lambda d, r: d.astype(r.dtype) + slope.astype(r.dtype) * r, direct, right
    )


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
                f"{checks.describe(x)}. Keep its real and imaginary parts apart, or use `dodge`."
            )
