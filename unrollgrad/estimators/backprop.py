"""Reverse-mode estimators: backpropagation through an episode or through one window of it."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import unroll
from unrollgrad._core.unroll import Remat
from unrollgrad.estimators._window import inner_state, made_by, nothing, windowed
from unrollgrad.types import (
    Estimate,
    GradientEstimator,
    Info,
    Segment,
    State,
    Theta,
    UnrolledProblem,
)


def bptt(
    problem: UnrolledProblem, *, last: int | None = None, remat: Remat = None
) -> GradientEstimator:
    """Backpropagation through a whole episode: the exact gradient of its loss.

    ``grad`` = d/dtheta [(1/T) sum_t loss_t + evaluate(final state)], through ``init`` too. Unbiased
    for the gradient of J where ``step`` is differentiable; its only variance is that of the
    episodes (data, initial states), which grows exponentially with T in chaotic problems.

    With ``last=m`` only the last m steps are differentiated: ``grad`` = d/dtheta [(1/T)
    sum_{t >= T - m} loss_t + evaluate(final state)] with the state before them a constant. That is
    biased, by what earlier steps do; for a final loss and an inner descent on a strongly convex
    loss the bias falls exponentially in m (Shaban et al.).

    Time: T steps forwards and back; m back. Memory: what T steps (m) compute, or with ``remat``
    less for more time:

    - ``"step"``: T states and what one step computes; one more forward pass.
    - ``"sqrt"``: sqrt(T) states and what sqrt(T) steps compute; one more forward pass.
    - a number n: the same with n states and T/n steps.

    Args:
        problem: The inner loop; its horizon must be static and its step differentiable.
        last: How many steps are differentiated, at the end. Default: all.
        remat: None, ``"step"``, ``"sqrt"`` or the number of states that are kept.

    Returns:
        An estimator with ``truncation=None``; streaming ``data`` has leading axis ``horizon``.

    Raises:
        ValueError: For a sampled horizon, ``last`` outside 1 to T, another ``remat`` or, when
            estimating, a ``while_loop`` in the step.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.bptt(problem), jax.random.key(0)
        >>> estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> round(float(estimate.grad), 2)
        35.72

    References:
        Werbos, Backpropagation through time: what it does and how to do it, Proc. IEEE, 1990.
        ``last``: Shaban et al., Truncated back-propagation for bilevel optimization, AISTATS 2019.
        ``"sqrt"``: Chen et al., Training deep nets with sublinear memory cost, 2016.
    """
    horizon = inner_loop.static_horizon(problem, "bptt")
    last = horizon if last is None else arguments.positive_int("last", last)
    if last > horizon:
        raise ValueError(
            f"`last`={last} steps are more than the horizon of {horizon}. Leave it out to "
            "differentiate the whole episode."
        )
    inner_loop.check_remat(remat)

    def whole(segment, theta, carried):
        return gradient("bptt", window(segment, None, remat), theta, horizon)[0], None

    def ending(segment, theta, carried):
        head, tail = _cut(segment, horizon - last)
        state = unroll.initial_state(problem, segment.episode, theta)
        state, losses = unroll.unroll(head, theta, state)
        out, _ = gradient("bptt", window(tail, state, remat, start=0.0), theta, horizon)
        share = last / horizon
        grad = jax.tree.map(lambda g: (share * g).astype(g.dtype), out.grad)
        return Estimate(grad, share * out.loss + (1 - share) * jnp.mean(losses), out.info), None

    run = whole if last == horizon else ending
    return windowed(problem, made_by("bptt", problem), None, nothing, run)


def _cut(segment: Segment, place: int) -> tuple[Segment, Segment]:
    """The steps before ``place``, and those from there on."""
    later = segment.episode._replace(t=segment.episode.t + place)
    head, tail = (
        jax.tree.map(lambda x, part=part: x[part], segment.data)
        for part in (slice(place), slice(place, None))
    )
    return (
        segment._replace(num_steps=place, data=head),
        segment._replace(episode=later, num_steps=segment.num_steps - place, data=tail),
    )


def tbptt(problem: UnrolledProblem, *, truncation: int, remat: Remat = None) -> GradientEstimator:
    """Truncated backpropagation: through one window, whose initial state is held constant.

    ``grad`` = d/dtheta of the window's mean loss, with the state at its start a constant (in the
    first window it is init(theta), differentiated). Biased: the influence of theta on a loss
    through steps before the window is dropped. Unbiased for J's gradient with truncation = horizon
    or without memory. With ``evaluate`` the window adds (T/K) (L_end - L_start).

    Variance: that of the data alone. Time: K steps forwards and back a call. Memory: what K steps
    compute; less with ``remat``, as in ``bptt``.

    Args:
        problem: The inner loop; its step must be differentiable.
        truncation: Inner steps per call (K); divides a static horizon.
        remat: None, ``"step"``, ``"sqrt"`` or the number of states that are kept.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation is not positive or does not divide the horizon, for another
            ``remat`` or, when estimating, for a ``while_loop`` in the step.

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
    truncation = inner_loop.check_truncation(problem, truncation)
    inner_loop.check_remat(remat)

    def run(segment, theta, state):
        return gradient("tbptt", window(segment, state, remat), theta, truncation)

    fingerprint = made_by("tbptt", problem, truncation=truncation)
    return windowed(problem, fingerprint, truncation, inner_state(problem), run)


def window(
    segment: Segment,
    state: State | None,
    remat: Remat = None,
    start: jax.Array | float | None = None,
) -> Callable[[Theta], tuple[jax.Array, State]]:
    """One window's loss, and the state after it, as a function of theta."""

    def loss(theta):
        out = unroll.window(segment, theta, state, start, remat)
        return out.loss(), out.state

    return loss


def gradient(
    name: str, loss: Callable[[Theta], tuple[jax.Array, State]], theta: Theta, inner_steps: int
) -> tuple[Estimate, State]:
    """The gradient of a window's loss, and the state after it."""
    with no_while_loop(name):
        (value, after), grad = jax.value_and_grad(loss, has_aux=True)(theta)
    return Estimate(grad, value, Info(jnp.int32(inner_steps))), after


FORWARD_ONLY = (
    "full_es",
    "truncated_es",
    "pes",
    "es_single",
    "gpes",
    "forward_mode",
    "dodge",
)
"""The estimators that only run ``step`` forwards; the registry's rows say the same."""


@contextlib.contextmanager
def no_while_loop(name: str) -> Iterator[None]:
    """Says what to do about a ``while_loop`` in the step of an estimator that goes backwards.

    Raises:
        ValueError: With the estimators that only go forwards.
    """
    try:
        yield
    except ValueError as error:
        if "Reverse-mode differentiation does not work for lax.while_loop" not in str(error):
            raise
        raise ValueError(
            f"{name} differentiates `step` in reverse mode, which a `while_loop` in it does not "
            f"allow. Use an estimator that only runs it forwards ({', '.join(FORWARD_ONLY)}), or a "
            "`fori_loop` or `scan` with a fixed number of steps."
        ) from error
