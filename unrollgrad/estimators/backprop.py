"""Reverse-mode estimators: backpropagation through an episode or through one window of it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import unroll
from unrollgrad._core.descriptions import described
from unrollgrad._core.float_leaves import floats_of, split
from unrollgrad._core.unroll import Remat
from unrollgrad.estimators import _retrace
from unrollgrad.estimators._retrace import Last
from unrollgrad.estimators._window import estimate_of, inner_state, made_by, nothing, windowed
from unrollgrad.types import Estimate, GradientEstimator, Segment, State, Theta, UnrolledProblem

__all__ = [
    "FORWARD_ONLY",
    "bptt",
    "continued",
    "cut",
    "gradient",
    "no_while_loop",
    "tbptt",
    "whole_episode",
]


@described
def bptt(
    problem: UnrolledProblem,
    *,
    last: Last = None,
    unbiased: bool = False,
    remat: Remat | Literal["reverse"] = None,
    inverse: Callable[..., State] | None = None,
) -> GradientEstimator:
    """Backpropagation through a whole episode: the exact gradient of its loss.

    ``grad`` = d/dtheta [(1/T) sum_t loss_t + evaluate(final state)], through ``init`` too. It is
    unbiased for the gradient of J if ``step`` is differentiable. Its only variance comes from the
    episodes (data, initial states); in chaotic problems it grows exponentially with T.

    With ``last=m`` only the last m steps are differentiated: ``grad`` = d/dtheta [(1/T)
    sum_{t >= T - m} loss_t + evaluate(final state)], with the state before them held constant. The
    bias is the influence of earlier steps; it falls exponentially in m for a final loss and inner
    descent on a strongly convex loss (Shaban et al.).

    ``last`` may be a law of m, a function of a key, from which each episode draws (AlignProp): the
    k-th step from the end then counts P(m >= k) times. ``unbiased=True`` divides its contribution
    by P(m >= k), which makes ``grad`` unbiased again (Russian roulette) at a variance that grows
    with the influence of early steps. The probabilities are exact for ``samplers.cutoff``; for
    another function they are the shares of 2^20 draws, of relative error 2^-10 sqrt(1/P - 1).

    Time: T steps forwards and T (or m) back. Memory: what T (or m) steps compute. ``remat`` trades
    one more forward pass for less memory: with ``"step"`` T states and what one step computes, with
    ``"sqrt"`` sqrt(T) states and what sqrt(T) steps compute, with a number n likewise n and T/n.
    Several numbers, (n, m, ...), are a tree: n states of the whole, m of the stretch between two of
    them, and so on: n + m + ... states, what T/(n m ...) steps compute, and a forward pass more for
    each number. ``"log"`` is the tree of twos: 2 log2(T) states, what one step computes (twice, if
    T is not a power of 2), and log2(T) more forward passes. For T = 4096, (16, 16, 16) takes 48
    states and 3 passes. The step is compiled once per level. ``replay`` runs such a tree in many
    dispatches, and goes on after a kill.

    With ``"reverse"`` it is what one step computes, whatever T is: ``inverse`` makes the states
    again, last to first, and the error of its states is the error of ``grad``. A law keeps T states
    (``remat="step"``), and with ``"reverse"`` one.

    Args:
        problem: The inner loop; its horizon must be static and its step differentiable.
        last: The number of steps, at the end, that are differentiated, or ``last(key)``, a law of
            it; what it draws is clipped to 1 to T. Default: all.
        unbiased: Whether to weight the steps by 1/P(m >= k); for a law only.
        remat: None, ``"step"``, ``"sqrt"``, ``"log"``, the number of states that are kept, a tuple
            of the numbers for each level of a tree, or ``"reverse"``.
        inverse: For ``"reverse"``: ``inverse(key, theta, state, t)`` returns the state before step
            t from the state after it, with the step's key (and its batch, if data is streamed).
            ``samplers.inverse`` makes the inverses of samplers.

    Returns:
        An estimator with ``truncation=None``; streaming ``data`` has leading axis ``horizon``.

    Raises:
        ValueError: If the horizon is sampled, ``last`` is outside 1 to T, ``unbiased`` meets a
            ``last`` that is a number or never draws T, ``remat`` is not one of these or does not
            fit ``last`` or ``inverse``, or, in ``estimate``, the step contains a ``while_loop``.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.bptt(problem), jax.random.key(0)
        >>> estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> round(float(estimate.grad), 2)
        35.72

    References:
        Werbos, Backpropagation through time: what it does and how to do it, Proc. IEEE, 1990.
        ``last``: Shaban et al., AISTATS 2019; a law: Prabhudesai et al., 2023, arXiv:2310.03739;
        ``unbiased``: Tallec and Ollivier, 2017, arXiv:1705.08209. ``"sqrt"`` and ``"log"``: Chen et
        al., 2016, arXiv:1604.06174. ``"reverse"``: Maclaurin et al., ICML 2015, arXiv:1502.03492.
    """
    horizon = inner_loop.static_horizon(problem, "bptt")
    _retrace.check(last, unbiased, remat, inverse)
    if callable(last):
        run = _retrace.window(horizon, last, unbiased, inverse)
    elif remat == "reverse":
        run = _retrace.window(horizon, _steps(last, horizon), False, inverse)
    else:
        run = _differentiated(horizon, _steps(last, horizon), remat)

    def explained(segment, theta, carried):
        with no_while_loop("bptt"):
            return run(segment, theta), None

    return windowed(problem, made_by("bptt", problem), None, nothing, explained)


def _steps(last: int | None, horizon: int) -> int:
    """The number of differentiated steps."""
    last = horizon if last is None else arguments.positive_int("last", last)
    if last > horizon:
        raise ValueError(
            f"`last`={last} steps are more than the horizon of {horizon}. Leave it out to "
            "differentiate the whole episode."
        )
    return last


def _differentiated(horizon: int, last: int, remat: Remat) -> Callable[[Segment, Theta], Estimate]:
    """The gradient of an episode's last steps, by JAX's own reverse mode."""

    def whole(segment, theta):
        return gradient("bptt", whole_episode(segment, remat), theta, horizon)

    def ending(segment, theta):
        head, tail = cut(segment, horizon - last)
        state = unroll.initial_state(segment.problem, segment.episode, theta)
        state, losses = unroll.unroll(head, theta, state)
        run = functools.partial(unroll.window, tail, state=state, start=0.0, remat=remat)
        out = gradient("bptt", run, theta, last)
        share = last / horizon
        grad = jax.tree.map(lambda g: (share * g).astype(g.dtype), out.grad)
        loss = share * out.loss + (1 - share) * jnp.mean(losses)
        return estimate_of(grad, loss, horizon)

    return whole if last == horizon else ending


def cut(segment: Segment, place: int) -> tuple[Segment, Segment]:
    """Cuts a segment into the steps before ``place`` and the rest."""
    later = segment.episode._replace(t=segment.episode.t + place)
    head = jax.tree.map(lambda x: x[:place], segment.data)
    tail = jax.tree.map(lambda x: x[place:], segment.data)
    return (
        segment._replace(num_steps=place, data=head),
        segment._replace(episode=later, num_steps=segment.num_steps - place, data=tail),
    )


@described
def tbptt(problem: UnrolledProblem, *, truncation: int, remat: Remat = None) -> GradientEstimator:
    """Truncated backpropagation: through one window, whose initial state is held constant.

    ``grad`` = d/dtheta of the window's mean loss, with the state at its start a constant (in the
    first window it is init(theta), differentiated). It is biased, since the influence of theta
    through earlier steps is dropped, and unbiased for J's gradient only with truncation = horizon
    or without memory. With ``evaluate`` the window adds (T/K) (L_end - L_start).

    Variance: from the data alone. Time: K steps forwards and back per call. Memory: what K steps
    compute; less with ``remat``, as in ``bptt``.

    Args:
        problem: The inner loop; its step must be differentiable.
        truncation: Inner steps per call (K); divides a static horizon.
        remat: None, ``"step"``, ``"sqrt"``, ``"log"``, a number or numbers, as in ``bptt``.

    Returns:
        An estimator; streaming ``data`` has leading axis ``truncation``.

    Raises:
        ValueError: If the truncation is not positive or does not divide the horizon, ``remat`` is
            not one of these or, in ``estimate``, the step contains a ``while_loop``.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> estimator, key = ug.tbptt(problem, truncation=10), jax.random.key(0)
        >>> estimate, state = estimator.estimate(key, theta, estimator.init(key, theta))
        >>> int(estimate.info.inner_steps), int(state.episode.t)
        (10, 10)

    References:
        Williams and Peng, Neural Computation, 1990.
    """
    truncation = inner_loop.check_truncation(problem, truncation)
    inner_loop.check_remat(remat)

    def run(segment, theta, state):
        run = functools.partial(unroll.window, segment, remat=remat)
        return continued("tbptt", segment, theta, state, run)

    fingerprint = made_by("tbptt", problem, truncation=truncation)
    return windowed(problem, fingerprint, truncation, inner_state(problem), run)


def whole_episode(segment: Segment, remat: Remat = None) -> Callable[[Theta], unroll.Window]:
    """Makes a function of theta that runs a whole episode."""

    def run(theta):
        return unroll.window(segment, theta, unroll.enter(segment, theta, None), remat=remat)

    return run


def gradient(
    name: str, run: Callable[[Theta], unroll.Window], theta: Theta, inner_steps: int
) -> Estimate:
    """Returns the gradient of the loss of a window ``run(theta)``."""
    with no_while_loop(name):
        value, grad = jax.value_and_grad(lambda theta: run(theta).loss())(theta)
    return estimate_of(grad, value, inner_steps)


def continued(
    name: str,
    segment: Segment,
    theta: Theta,
    state: State,
    run: Callable[[Theta, State], unroll.Window],
) -> tuple[Estimate, State]:
    """Returns the gradient of the loss of a window ``run(theta, state)``, and the state after it.

    The state at the window's start is ``unroll.enter``'s: a constant or, in the first window,
    ``init``'s result, which is differentiated. Both are done only in calls that begin an episode,
    so that ``init`` is not part of the function that JAX differentiates.
    """
    floats, rebuild = split(unroll.enter(segment, theta, state))

    def loss(theta, floats):
        out = run(theta, rebuild(floats))
        return out.loss(), out.state

    def through_init(episode, theta):
        def initial(theta):
            return floats_of(unroll.initial_state(segment.problem, episode, theta))

        return jax.vjp(initial, theta)[1](slope)[0]

    with no_while_loop(name):
        value, back, after = jax.vjp(loss, theta, floats, has_aux=True)
        grad, slope = back(jnp.ones_like(value))
        none = jax.tree.map(jnp.zeros_like, grad)
        added = unroll.reset(segment.episode, theta, through_init, none)
    grad = jax.tree.map(jnp.add, grad, added)
    return estimate_of(grad, value, segment.num_steps), after


FORWARD_ONLY = ("full_es", "truncated_es", "pes", "es_single", "gpes", "forward_mode", "dodge")
"""The estimators that only run ``step`` forwards; the registry's rows agree with it."""


@contextlib.contextmanager
def no_while_loop(name: str) -> Iterator[None]:
    """Explains JAX's error about a ``while_loop`` in a step that is differentiated backwards.

    Raises:
        ValueError: If there is one; the message names the estimators that only run forwards.
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
