"""Reverse-mode estimators: backpropagation through an episode or through one window of it."""

from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad import checks, unroll
from unrollgrad.estimators import worker
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


def bptt(problem: UnrolledProblem) -> GradientEstimator:
    """Backpropagation through a whole episode: the exact gradient of its loss.

    ``grad`` = d/dtheta [(1/T) sum_t loss_t + evaluate(final state)], through ``init`` too. Unbiased
    for the gradient of J where ``step`` is differentiable; its only variance is that of the
    episodes (data, initial states), which grows exponentially with T in chaotic problems.

    Time: T steps forwards and back. Memory: T states.

    Args:
        problem: The inner loop; its horizon must be static and its step differentiable.

    Returns:
        An estimator with ``truncation=None``; streaming ``data`` has leading axis ``horizon``.

    Raises:
        ValueError: For a sampled horizon or, when estimating, a ``while_loop`` in the step.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.bptt(problem), jax.random.key(0)
        >>> estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> round(float(estimate.grad), 2)
        35.72

    References:
        Werbos, Backpropagation through time: what it does and how to do it, Proc. IEEE, 1990.
    """
    horizon = checks.static_horizon(problem, "bptt")
    made_by = worker.made_by("bptt", problem)

    def init(key: Key, theta: Theta) -> worker.EpisodeState:
        return worker.init_episode(problem, key, theta, horizon, made_by)

    def estimate(key: Key, theta: Theta, state: worker.EpisodeState, *, data: Any = None):
        key, theta = worker.admit(problem, init, key, theta, state, data, horizon, "horizon")
        episode = unroll.new_episode(problem, key, horizon)
        out, _ = _backprop(problem, "bptt", episode, theta, None, horizon, data)
        return out, worker.EpisodeState(unroll.advance(episode, horizon), made_by)

    return worker.compiled(init, estimate, None)


def tbptt(problem: UnrolledProblem, *, truncation: int) -> GradientEstimator:
    """Truncated backpropagation: through one window, whose initial state is held constant.

    ``grad`` = d/dtheta of the window's mean loss, with the state at its start a constant (in the
    first window it is init(theta), differentiated). Biased: the influence of theta on a loss
    through steps before the window is dropped. Unbiased for J's gradient with truncation = horizon
    or without memory. With ``evaluate`` the window adds (T/K) (L_end - L_start).

    Variance: that of the data alone. Time: K steps forwards and back a call. Memory: K states.

    Args:
        problem: The inner loop; its step must be differentiable.
        truncation: Inner steps per call (K); divides a static horizon.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation is not positive or does not divide the horizon or, when
            estimating, for a ``while_loop`` in the step.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator = ug.tbptt(problem, truncation=10)
        >>> state = estimator.init(jax.random.key(0), theta)
        >>> estimate, state = estimator.estimate(jax.random.key(1), theta, state)
        >>> int(estimate.info.inner_steps), int(state.episode.t)
        (10, 10)

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent
        network trajectories, Neural Computation, 1990.
    """
    truncation = checks.check_truncation(problem, truncation)
    made_by = worker.made_by("tbptt", problem, truncation=truncation)

    def init(key: Key, theta: Theta) -> worker.MeanState:
        return worker.init_mean(problem, key, theta, truncation, made_by)

    def estimate(key: Key, theta: Theta, state: worker.MeanState, *, data: Any = None):
        key, theta = worker.admit(problem, init, key, theta, state, data, truncation, "truncation")
        episode = unroll.continue_or_begin(problem, key, state.episode, truncation)
        out, after = _backprop(problem, "tbptt", episode, theta, state.state, truncation, data)
        return out, worker.MeanState(unroll.advance(episode, truncation), after, made_by)

    return worker.compiled(init, estimate, truncation)


def _backprop(
    problem: UnrolledProblem,
    name: str,
    episode: Episode,
    theta: Theta,
    state: State | None,
    num_steps: int,
    data: Any,
) -> tuple[Estimate, State]:
    """The gradient of one window's loss, and the state after it."""

    def loss(theta):
        window = unroll.window(problem, episode, theta, state, num_steps, data)
        return window.loss(), window.state

    try:
        (value, after), grad = jax.value_and_grad(loss, has_aux=True)(theta)
    except ValueError as error:
        if "Reverse-mode differentiation does not work for lax.while_loop" not in str(error):
            raise
        raise ValueError(
            f"{name} differentiates `step` in reverse mode, which a `while_loop` in it does not "
            f"allow. Use an estimator that only runs it forwards ({_forward_only()}), or a "
            "`fori_loop` or `scan` with a fixed number of steps."
        ) from error
    return Estimate(grad, value, Info(jnp.int32(num_steps))), after


def _forward_only() -> str:
    from unrollgrad.estimators import REGISTRY  # here, since the registry imports this module

    return ", ".join(name for name, row in REGISTRY.items() if not row.reverse_mode)
