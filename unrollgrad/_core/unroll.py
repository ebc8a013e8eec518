"""Episodes and the one scan over inner steps that every estimator shares.

All randomness of an episode comes from its key, by stream: the initial state, step t, noise period
j, the evaluation and the horizon. Nothing is drawn from the key of a later call, so a step is a
pure function of (episode, t): both signs of a pair see the same data, a truncated run sees what the
untruncated one sees, and a saved state continues bit for bit.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import mesh_axes
from unrollgrad.types import Episode, Key, Segment, State, Theta, UnrolledProblem

Remat = Literal["step", "sqrt"] | int | None
"""What backpropagation keeps: everything, the state of every step, or of some steps."""

_INIT, _STEP, _NOISE, _EVALUATE, _HORIZON = range(5)


def noise_key(episode: Episode, period: Any) -> Key:
    """The key of the episode's noise period ``period``."""
    return jax.random.fold_in(jax.random.fold_in(episode.key, _NOISE), period)


def new_episode(problem: UnrolledProblem, key: Key, truncation: int) -> Episode:
    """An episode at t = 0; a sampled horizon is rounded up to a multiple of ``truncation``.

    Raises:
        TypeError: If the horizon's sampler does not return a whole number.
    """
    horizon = problem.horizon
    if callable(horizon):
        horizon = horizon(jax.random.fold_in(key, _HORIZON))
        if not jnp.issubdtype(arguments.dtype_of(horizon), jnp.integer) or jnp.shape(horizon) != ():
            raise TypeError(
                "`problem.horizon(key)` must return a whole number; got "
                f"{arguments.describe(horizon)}. Round it and cast it to int32."
            )
        windows = -(-jnp.asarray(horizon, jnp.int32) // truncation)
        horizon = truncation * jnp.maximum(windows, 1)
    episode = Episode(
        key, jnp.zeros((), jnp.int32), arguments.strong(jnp.asarray(horizon, jnp.int32))
    )
    return mesh_axes.over(mesh_axes.axes(key), episode)


def continue_or_begin(
    problem: UnrolledProblem, key: Key, episode: Episode, truncation: int
) -> Episode:
    """The episode as it stands, or where t is 0 a new one from ``key``."""
    begun = new_episode(problem, key, truncation)
    return jax.tree.map(lambda new, old: jnp.where(episode.t == 0, new, old), begun, episode)


def advance(episode: Episode, truncation: int) -> Episode:
    """The episode ``truncation`` steps on; t = 0 if that ends it."""
    t = episode.t + truncation
    return episode._replace(t=jnp.where(t >= episode.horizon, 0, t))


def initial_state(problem: UnrolledProblem, episode: Episode, theta: Theta) -> State:
    """The state in which the episode begins."""
    key = jax.random.fold_in(episode.key, _INIT)
    state = arguments.strong_state(problem.init(key, theta), made_by="init")
    return mesh_axes.over(mesh_axes.axes((key, theta)), state)


def evaluate(problem: UnrolledProblem, episode: Episode, theta: Theta, state: State) -> jax.Array:
    """``problem.evaluate`` of the state, with the key that is fixed for the episode."""
    assert problem.evaluate is not None
    key = jax.random.fold_in(episode.key, _EVALUATE)
    return _as_loss(problem.evaluate(key, theta, state))


def evaluate_shape(problem: UnrolledProblem, episode: Episode, theta: Theta, state: State) -> Any:
    """The shape and dtype of ``evaluate``'s result; nothing is computed."""
    return jax.eval_shape(lambda *args: evaluate(problem, *args), episode, theta, state)


def unroll(
    segment: Segment, theta: Theta, state: State, remat: Remat = None
) -> tuple[State, jax.Array]:
    """Runs the segment's inner steps.

    Args:
        segment: The stretch of the episode.
        theta: Outer parameters.
        state: The inner state at its start.
        remat: What backpropagation keeps, as ``bptt`` says.

    Returns:
        The state after them and the losses of shape ``(num_steps,)``, at least float32.
    """

    def step(state, key, t, batch):
        return one_step(segment.problem, key, theta, state, t, batch)

    return scan(segment, step, state, remat)


def one_step(
    problem: UnrolledProblem, key: Key, theta: Theta, state: State, t: Any, batch: Any
) -> tuple[State, jax.Array]:
    """Step ``t`` with its own key: the state after it, and its loss, at least float32."""
    extra = () if batch is None else (batch,)
    state, loss = problem.step(key, theta, state, t, *extra)
    return arguments.strong_state(state, made_by="step"), _as_loss(loss)


def scan(
    segment: Segment, step: Callable[..., tuple[Any, Any]], carry: Any, remat: Remat = None
) -> tuple[Any, Any]:
    """The one scan over inner steps: ``step(carry, key, t, batch) -> (carry, out)`` for each."""
    episode, num_steps = segment.episode, segment.num_steps
    keys = jax.random.fold_in(episode.key, _STEP)

    def body(carry, inputs):
        i, batch = inputs
        t = episode.t + i
        return step(carry, jax.random.fold_in(keys, t), t, batch)

    inputs = (jnp.arange(num_steps, dtype=jnp.int32), segment.data)
    if remat is None:
        return jax.lax.scan(body, carry, inputs)
    if remat == "step":
        return jax.lax.scan(_remade(body), carry, inputs)
    # Stretches of equal length, and what is left over; each keeps the state it begins with.
    wanted = math.isqrt(num_steps) if remat == "sqrt" else min(remat, num_steps)
    length = -(-num_steps // wanted)
    stretches = num_steps // length
    whole = stretches * length

    @_remade
    def stretch(carry, inputs):
        return jax.lax.scan(body, carry, inputs)

    first = jax.tree.map(lambda x: x[:whole].reshape(stretches, length, *x.shape[1:]), inputs)
    carry, out = jax.lax.scan(stretch, carry, first)
    out = out.ravel()
    if whole == num_steps:
        return carry, out
    carry, rest = stretch(carry, jax.tree.map(lambda x: x[whole:], inputs))
    return carry, jnp.concatenate([out, rest])


def _remade(body: Any) -> Any:
    """``body``, whose results backpropagation computes again from its arguments."""
    return jax.checkpoint(body, prevent_cse=False)  # in a scan nothing can be merged with it


def reset(episode: Episode, begin: Callable[[Episode], Any], carried: Any) -> Any:
    """``begin(episode)`` where the episode is at its start, ``carried`` elsewhere."""
    first = episode.t == 0
    if mesh_axes.axes(first):
        # In shard_map no `cond`: under vmap JAX makes it a select of all it closes over, which then
        # vary over devices where the branch was traced with constants, and fails (jax 0.10).
        return jax.tree.map(lambda new, old: jnp.where(first, new, old), begin(episode), carried)
    return jax.lax.cond(first, lambda: begin(episode), lambda: carried)


def reset_forwards(episode: Episode, begin: Callable[[Episode], Any], carried: Any) -> Any:
    """As ``reset``, where nothing is differentiated in reverse mode.

    A loop of one turn or none: it overwrites the carried state in place, and under ``vmap`` it runs
    ``begin`` only if one of the episodes is at its start, where a ``cond`` would run it always.
    """
    first = episode.t == 0
    if mesh_axes.axes(first):
        return reset(episode, begin, carried)

    def turn(carry):
        # XLA takes out of a loop what no turn changes, and would begin an episode in every call.
        # Where `waiting` is False under vmap, what begins is dropped.
        waiting, _ = carry
        data = jnp.where(waiting, jax.random.key_data(episode.key), 0)
        key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(episode.key))
        return jnp.zeros_like(waiting), begin(episode._replace(key=key))

    return jax.lax.while_loop(lambda carry: carry[0], turn, (first, carried))[1]


class Window(NamedTuple):
    """One window of one trajectory.

    Attributes:
        state: The inner state at its end.
        losses: The losses of its steps, shape ``(num_steps,)``.
        start: (T/K) times ``evaluate`` at its start, 0 in the first; None without ``evaluate``.
        end: (T/K) times ``evaluate`` at its end; None without ``evaluate``.
    """

    state: State
    losses: jax.Array
    start: jax.Array | None
    end: jax.Array | None

    def loss(self) -> jax.Array:
        """What the window contributes to J: averaged over an episode's windows it is J."""
        mean = jnp.mean(self.losses)
        if self.start is None or self.end is None:
            return mean
        return mean + self.end - self.start


def window(
    segment: Segment,
    theta: Theta,
    state: State | None,
    start: jax.Array | float | None = None,
    remat: Remat = None,
    reset: Callable[[Episode, Callable[[Episode], Any], Any], Any] = reset,
) -> Window:
    """Runs one window from ``state``, beginning the episode under ``theta`` where t is 0.

    Args:
        segment: The window.
        theta: Outer parameters, perturbed or not; a gradient through them includes ``init``.
        state: The state at the window's start; ignored where t is 0. None: the window is a whole
            episode.
        start: The ``end`` of the window before, where the caller kept it; else the state at the
            window's start is evaluated.
        remat: What backpropagation keeps, as ``bptt`` says.
        reset: How the state is replaced where t is 0.
    """
    problem, episode = segment.problem, segment.episode

    def begin(episode):
        return initial_state(problem, episode, theta)

    before = begin(episode) if state is None else reset(episode, begin, state)
    after, losses = unroll(segment, theta, before, remat)
    if problem.evaluate is None:
        return Window(after, losses, None, None)
    if state is not None and start is None:
        # Where the window is the first, no gradient goes this way: 0 times one that is not finite
        # would be NaN.
        first = episode.t == 0
        fixed = jax.tree.map(lambda x: jnp.where(first, jax.lax.stop_gradient(x), x), theta)
        start = weigh(segment, evaluate(problem, episode, fixed, state))
    end = weigh(segment, evaluate(problem, episode, theta, after))
    return Window(after, losses, since(segment, start, end), end)


def weigh(segment: Segment, evaluated: Any) -> Any:
    """T/K times what was evaluated at an end of the segment: an episode has T/K windows."""
    horizon = inner_loop.static_horizon(segment.problem, "problem.evaluate")
    return jax.tree.map(lambda x: horizon / segment.num_steps * x, evaluated)


def since(segment: Segment, start: Any, end: Any) -> Any:
    """What is subtracted from ``end``: ``start``, but 0 in an episode's first window."""
    if start is None:
        return jax.tree.map(jnp.zeros_like, end)
    first = segment.episode.t == 0
    return jax.tree.map(lambda x: jnp.where(first, 0.0, x), start)


def episode_loss(problem: UnrolledProblem, key: Key, theta: Theta, *, data: Any = None):
    """The loss of one whole episode: one unbiased sample of J(theta).

    Args:
        problem: The inner loop, with a static horizon.
        key: The episode's key; ``bptt(problem).estimate(key, ...)`` sees the same episode.
        theta: Outer parameters.
        data: Streaming data with leading axis ``horizon``, or None.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: If the horizon is sampled, or the loss is not a scalar.
        TypeError: If the step changes the state's structure.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.influence_balancing(horizon=100)
        >>> round(float(ug.episode_loss(problem, jax.random.key(0), theta)), 3)
        9.948
    """
    horizon = inner_loop.static_horizon(problem, "episode_loss")
    key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
    arguments.check_data(data, horizon, "horizon")
    inner_loop.check_step(problem, key, theta, data)
    segment = Segment(problem, new_episode(problem, key, horizon), horizon, data)
    return window(segment, theta, None).loss()


def _as_loss(loss: Any) -> jax.Array:
    loss = jnp.asarray(loss)
    return loss.astype(jnp.promote_types(loss.dtype, jnp.float32))
