"""Forward-mode estimators: the worker carries the state's derivative, so nothing is forgotten.

``forward_mode`` carries all of it, ``dodge`` its product with one direction. Neither runs
backwards, so memory does not grow with the truncation.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import mesh_axes, unroll
from unrollgrad._core.descriptions import described
from unrollgrad._core.dtypes import wide
from unrollgrad._core.float_leaves import floats_of, split
from unrollgrad.estimators import _persistence
from unrollgrad.estimators._window import estimate_of, made_by, windowed
from unrollgrad.noise import rademacher, sample
from unrollgrad.noise._dense import cut
from unrollgrad.types import GradientEstimator, Segment, State, Theta, UnrolledProblem

__all__ = ["Tangents", "dodge", "forward_mode"]


class Tangents(NamedTuple):
    """The carried state of a worker with derivatives of its inner state.

    Attributes:
        state: The inner state.
        tangents: The derivatives of the state's floating leaves, in their order; with a leading
            axis of dim(theta) for ``forward_mode``.
        accumulated: The sum of the finished periods' directions; None if there are no periods.
        evaluated: (T/K) ``evaluate`` at the end of the last window and its derivative, shape
            ``(2,)``; None if it is not needed.
    """

    state: State
    tangents: list[jax.Array]
    accumulated: Theta | None = None
    evaluated: jax.Array | None = None


@described
def forward_mode(
    problem: UnrolledProblem, *, truncation: int, max_bytes: int = 2**30
) -> GradientEstimator:
    """Forward-mode differentiation (RTRL): the exact gradient, window by window.

    The sensitivities d state / d theta are carried through the episode as a batch of dim(theta)
    tangents. ``grad`` = d/dtheta of the window's mean loss, through all earlier steps and ``init``;
    averaged over an episode's windows at one theta it is ``bptt``'s gradient. With ``evaluate`` the
    window adds (T/K) (L_end - L_start). Updates of theta inside an episode add a bias that vanishes
    with the outer learning rate.

    Variance: from the data alone. Time: K steps forwards, each with dim(theta) tangents. Memory:
    dim(theta) times (state + theta + what one step computes), whatever the truncation, for each
    worker of an ``average``.

    Args:
        problem: The inner loop; its step must be differentiable forwards (it may contain a
            ``while_loop`` but not a ``jax.custom_vjp``).
        truncation: Inner steps per call (K); divides a static horizon.
        max_bytes: Limit for one worker's tangents and directions, checked before anything is
            allocated; what a step computes on the way is not counted.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If a setting is not positive, the truncation does not divide the horizon, or the
            tangents would need more than ``max_bytes``.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.forward_mode(problem, truncation=100), jax.random.key(0)
        >>> estimate, state = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> round(float(estimate.grad), 2)
        35.72

    References:
        Williams and Zipser, Neural Computation, 1989.
    """
    truncation = inner_loop.check_truncation(problem, truncation)
    max_bytes = arguments.positive_int("max_bytes", max_bytes)
    fingerprint = made_by("forward_mode", problem, truncation=truncation)

    def begin(episode, theta):
        dim = _dim(theta)
        shapes = jax.eval_shape(partial(unroll.initial_state, problem), episode, theta)
        _check_bytes(dim, theta, shapes, max_bytes)
        state = unroll.initial_state(problem, episode, theta)
        return Tangents(state, [jnp.zeros((dim, *x.shape), x.dtype) for x in floats_of(state)])

    def window(segment, theta, carried):
        names = mesh_axes.axes((theta, segment.episode, segment.data, carried.state))
        push = _pushforward(segment, theta, carried.state)
        result, along = jax.vmap(push, out_axes=(None, 0))(
            mesh_axes.over(names, _basis(theta)), carried.tangents, None
        )
        slopes = jnp.mean(along.losses, axis=-1)
        if along.end is not None and along.start is not None:
            slopes = slopes + along.end - along.start
        out = estimate_of(_unflatten(theta, slopes), result.loss(), truncation)
        return out, Tangents(result.state, along.floats)

    return windowed(problem, fingerprint, truncation, begin, window)


@described
def dodge(
    problem: UnrolledProblem, *, truncation: int, noise_period: int | None = None
) -> GradientEstimator:
    """The derivative along one random direction, times that direction (DODGE, forward gradients).

    It is the limit of ``gpes`` for sigma to 0: the worker carries the state's derivative along a
    direction u of random signs, and all directions so far weigh the window's slope: ``grad`` =
    (u_1 + ... + u_j) dL/du in noise period j, L the window's mean loss. Averaged over an episode's
    windows it is unbiased for the gradient of J itself, without smoothing, if the step is
    differentiable; it explodes in chaotic problems, as J's gradient does. ``noise_period=None``
    keeps one direction for the whole episode; ``noise_period=truncation`` draws one per window, the
    online forward gradient. With ``evaluate`` a window adds (T/K) (xi_t L_end' - xi_{t-1}
    L_start'), xi the sum of directions so far.

    Variance: (P - 1) |g|^2 with one direction per episode (P = dim(theta), so 0 for P = 1), about
    as in ``gpes`` with more periods; divided by the number of workers. Time: K steps with one
    tangent, about 2 to 3 forward passes. Memory: 2 states + 2 theta, whatever the truncation.

    Args:
        problem: The inner loop; its step must be differentiable forwards, as in ``forward_mode``.
        truncation: Inner steps per call (K); divides a static horizon.
        noise_period: Inner steps between draws, a multiple of K; None: one draw per episode.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If a setting is not positive, or K does not divide the horizon or noise period.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.dodge(problem, truncation=100), jax.random.key(0)
        >>> estimate, state = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> round(float(estimate.grad), 2)
        35.72

    References:
        Silver et al., ICLR 2022. Baydin et al., 2022, arXiv:2202.08587. Li et al., NeurIPS 2023.
    """
    truncation = inner_loop.check_truncation(problem, truncation)
    noise_period = _persistence.check_period(noise_period, truncation)
    law = rademacher()

    def begin(episode, theta):
        state = unroll.initial_state(problem, episode, theta)
        tangents = [jnp.zeros_like(x) for x in floats_of(state)]
        accumulated, evaluated = None, None
        if noise_period is not None:
            accumulated = jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), theta)
        if problem.evaluate is not None:
            evaluated = jnp.zeros(2, unroll.evaluate_shape(problem, episode, theta, state).dtype)
        return Tangents(state, tangents, accumulated, evaluated)

    def window(segment, theta, carried):
        episode = segment.episode
        names = mesh_axes.axes((theta, episode, carried.state, segment.data))
        drawn = sample(law, _persistence.noise_key(episode, noise_period), theta, 1)
        unit = mesh_axes.over(names, jax.tree.map(lambda u: u[0], drawn))
        direction = jax.tree.map(lambda u, x: u.astype(x.dtype), unit, theta)  # signs are exact
        push = _pushforward(segment, theta, carried.state)
        result, along = push(direction, carried.tangents, carried.evaluated)
        noise = _persistence.accumulate(
            episode.t, truncation, noise_period, carried.accumulated, unit
        )
        slope, evaluated = jnp.mean(along.losses), None
        if result.end is not None and along.end is not None:
            slope, evaluated = slope + along.end, jnp.stack([result.end, along.end])

        def leaf(x, now, before):
            g = now * slope.astype(now.dtype)
            if along.start is not None:
                g = g - before * along.start.astype(before.dtype)
            return g.astype(x.dtype)

        grad = jax.tree.map(leaf, theta, noise.now, noise.before)
        out = estimate_of(grad, result.loss(), truncation)
        return out, Tangents(result.state, along.floats, noise.accumulated, evaluated)

    fingerprint = made_by("dodge", problem, truncation=truncation, noise_period=noise_period)
    return windowed(problem, fingerprint, truncation, begin, window)


class _Along(NamedTuple):
    """The derivative of a ``Window`` along a direction; ``floats`` belongs to its state."""

    floats: list[jax.Array]
    losses: jax.Array
    start: jax.Array | None
    end: jax.Array | None


def _pushforward(
    segment: Segment, theta: Theta, state: State
) -> Callable[[Theta, list[jax.Array], jax.Array | None], tuple[unroll.Window, _Along]]:
    """Makes ``push(direction, tangents, evaluated)``: one window, and its derivative along both.

    ``evaluated`` is the evaluation at the window's start and its derivative; if it is None, the
    state at the start is evaluated.
    """
    floats, rebuild = split(state)

    def push(direction, tangents, evaluated):
        def window(theta, floats, start):
            before = unroll.enter(segment, theta, rebuild(floats))
            out = unroll.window(segment, theta, before, start)
            return _Along(floats_of(out.state), out.losses, out.start, out.end), out

        start, slope = (None, None) if evaluated is None else evaluated
        _, along, out = jax.jvp(
            window, (theta, floats, start), (direction, tangents, slope), has_aux=True
        )
        return out, along

    return push


def _dim(theta: Theta) -> int:
    return sum(x.size for x in jax.tree.leaves(theta))


def _basis(theta: Theta) -> Theta:
    """Makes the unit directions of theta, leading axis dim(theta)."""
    dim, first, out = _dim(theta), 0, []
    leaves, structure = jax.tree.flatten(theta)
    for x in leaves:
        rows = jnp.eye(dim, x.size, k=-first, dtype=x.dtype)
        out.append(rows.reshape(dim, *x.shape))
        first += x.size
    return structure.unflatten(out)


def _unflatten(theta: Theta, numbers: jax.Array) -> Theta:
    """Makes a tree like theta from one number per coordinate."""
    leaves, structure = jax.tree.flatten(theta)
    parts = zip(cut(numbers, leaves), leaves, strict=True)
    return structure.unflatten(part.astype(x.dtype) for part, x in parts)


def _check_bytes(dim: int, theta: Theta, state: State, max_bytes: int) -> None:
    """Raises ValueError if the tangents and their directions need more than ``max_bytes``."""
    sizes = [
        sum(x.size * x.dtype.itemsize for x in t)
        for t in (jax.tree.leaves(theta), floats_of(state))
    ]
    need = dim * sum(sizes)
    if need > max_bytes:
        raise ValueError(
            f"forward_mode needs {need / 2**20:.4g} MiB for {dim} tangents, one per number in "
            f"theta, of {sizes[1]} bytes of state and {sizes[0]} of direction each; `max_bytes` "
            f"allows {max_bytes / 2**20:.4g} MiB. Use `dodge` or `uoro`, whose memory does not "
            "grow with theta's size times the state's, or raise max_bytes."
        )
