"""Episodes and the one scan over inner steps that every estimator shares.

An episode draws all of its random numbers from its own key, in one stream each for the initial
state, the steps, the noise periods, the evaluation and the horizon. The keys of later calls are not
used, so a step is a pure function of (episode, t): both signs of a pair see the same data, a
truncated run sees the data of the untruncated run, and a saved state continues bit for bit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import eager, mesh_axes
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad.types import (
    ArrayTree,
    Episode,
    Key,
    Numeric,
    Segment,
    State,
    Theta,
    UnrolledProblem,
)

Remat = Literal["step", "sqrt", "log"] | int | tuple[int, ...] | None
"""The states that backpropagation keeps: all values (None), every step's state, or some states."""

INNER_GRADIENT = "unrollgrad inner gradient"
"""The name of values that backpropagation keeps where it keeps the state of every step."""

_Data = ArrayTree | None
_Carry = TypeVar("_Carry")
_Tree = TypeVar("_Tree")

Horizon = int | Callable[[Key], Numeric]
"""The inner steps of an episode, or a sampler of them."""

_INIT, _STEP, _NOISE, _EVALUATE, _HORIZON = range(5)


def noise_key(episode: Episode, period: Numeric) -> Key:
    """Returns the key of the episode's noise period ``period``."""
    return jax.random.fold_in(jax.random.fold_in(episode.key, _NOISE), period)


def step_keys(episode: Episode) -> Key:
    """Returns the key from which ``fold_in(key, t)`` makes the key of step t."""
    return jax.random.fold_in(episode.key, _STEP)


def new_episode(horizon: Horizon, key: Key, truncation: int) -> Episode:
    """Makes an episode at t = 0; a sampled horizon is rounded up to a multiple of ``truncation``.

    Raises:
        TypeError: If the sampler of the horizon does not return a whole number.
    """
    length = horizon
    if callable(horizon):
        drawn = horizon(jax.random.fold_in(key, _HORIZON))
        if not jnp.issubdtype(arguments.dtype_of(drawn), jnp.integer) or jnp.shape(drawn) != ():
            raise TypeError(
                "`problem.horizon(key)` must return a whole number; got "
                f"{arguments.describe(drawn)}. Round it and cast it to int32."
            )
        windows = -(-jnp.asarray(drawn, jnp.int32) // truncation)
        length = truncation * jnp.maximum(windows, 1)
    length = arguments.strong(jnp.asarray(length, jnp.int32))
    return mesh_axes.over(mesh_axes.axes(key), Episode(key, jnp.zeros((), jnp.int32), length))


def continue_or_begin(horizon: Horizon, key: Key, episode: Episode, truncation: int) -> Episode:
    """Returns the episode unchanged, or a new one from ``key`` where t is 0."""
    return select(episode.t == 0, new_episode(horizon, key, truncation), episode)


def select(first: jax.Array, new: _Tree, old: _Tree) -> _Tree:
    """``jnp.where(first, new, old)`` of trees whose leaves may be keys.

    A key that is kept is not used: its draws come from ``fold_in``. JAX's checker
    (``jax_debug_key_reuse``) counts a selection as a use of both keys, unless they are clones.
    """

    def leaf(new, old):
        if not jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
            return jnp.where(first, new, old)
        return jax.random.clone(jnp.where(first, new, jax.random.clone(old)))

    return jax.tree.map(leaf, new, old)


def advance(episode: Episode, truncation: int) -> Episode:
    """Moves the episode on by ``truncation`` steps; t becomes 0 at its end."""
    t = episode.t + truncation
    return episode._replace(t=jnp.where(t >= episode.horizon, 0, t))


def initial_state(problem: UnrolledProblem, episode: Episode, theta: Theta) -> State:
    """Draws the episode's first inner state."""
    key = jax.random.fold_in(episode.key, _INIT)
    state = arguments.strong_state(problem.init(key, theta), made_by="init")
    return mesh_axes.over(mesh_axes.axes((key, theta)), state)


def evaluate(problem: UnrolledProblem, episode: Episode, theta: Theta, state: State) -> jax.Array:
    """Evaluates the state with ``problem.evaluate`` and the episode's key for it."""
    assert problem.evaluate is not None
    key = jax.random.fold_in(episode.key, _EVALUATE)
    return _as_loss(problem.evaluate(key, theta, state))


def evaluate_shape(
    problem: UnrolledProblem, episode: Episode, theta: Theta, state: State
) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of ``evaluate``'s result without computing it."""
    return jax.eval_shape(lambda *args: evaluate(problem, *args), episode, theta, state)


def unroll(
    segment: Segment, theta: Theta, state: State, remat: Remat = None
) -> tuple[State, jax.Array]:
    """Runs the segment's inner steps from ``state``; ``remat`` as in ``bptt``.

    Returns:
        The state after the steps and their losses, shape ``(num_steps,)``, at least float32.
    """

    def step(state, key, t, batch):
        return one_step(segment.problem, key, theta, state, t, batch)

    return scan(segment, step, state, remat)


def step_key(episode: Episode, t: Numeric) -> Key:
    """Returns the key of the episode's step ``t``."""
    return jax.random.fold_in(step_keys(episode), t)


def one_step(
    problem: UnrolledProblem, key: Key, theta: Theta, state: State, t: jax.Array, batch: _Data
) -> tuple[State, jax.Array]:
    """Takes step ``t`` with the step's own key; the loss is at least float32."""
    extra = () if batch is None else (batch,)
    state, loss = problem.step(key, theta, state, t, *extra)
    return arguments.strong_state(state, made_by="step"), _as_loss(loss)


def scan(
    segment: Segment,
    step: Callable[..., tuple[_Carry, Any]],
    carry: _Carry,
    remat: Remat = None,
) -> tuple[_Carry, Any]:
    """Scans ``step(carry, key, t, batch) -> (carry, out)`` over the segment's inner steps.

    ``out`` is a scalar; without ``remat`` any tree.
    """
    episode, num_steps = segment.episode, segment.num_steps
    keys = step_keys(episode)

    def body(carry, inputs):
        i, batch = inputs
        t = episode.t + i
        return step(carry, jax.random.fold_in(keys, t), t, batch)

    inputs = (jnp.arange(num_steps, dtype=jnp.int32), segment.data)
    numbers = _numbers_of_states(remat, num_steps)
    if len(numbers) > 1:
        return _nested(body, carry, inputs, numbers)
    if not numbers:
        return jax.lax.scan(body, carry, inputs)
    # Stretches of equal length, and the remaining steps; each keeps its first state.
    length = -(-num_steps // numbers[0])
    if length == 1:
        return jax.lax.scan(_remade(body, INNER_GRADIENT), carry, inputs)
    stretches = num_steps // length
    whole = stretches * length

    @_remade
    def stretch(carry, inputs):
        return jax.lax.scan(body, carry, inputs)

    first = jax.tree.map(lambda x: x[:whole].reshape(stretches, length, *x.shape[1:]), inputs)
    carry, out = jax.lax.scan(stretch, carry, first)
    if whole == num_steps:
        return carry, out.ravel()
    carry, rest = stretch(carry, jax.tree.map(lambda x: x[whole:], inputs))
    return carry, jnp.concatenate([out.ravel(), rest])


def _numbers_of_states(remat: Remat, num_steps: int) -> tuple[int, ...]:
    """The numbers of states that are kept: of the whole, of one of its stretches, and so on."""
    if remat is None:
        return ()
    if isinstance(remat, tuple):
        return _cut(remat, num_steps)
    if remat == "log":
        return branches(num_steps, 2)
    if isinstance(remat, str):
        return (num_steps if remat == "step" else math.isqrt(num_steps),)
    return (min(remat, num_steps),)


def _cut(numbers: tuple[int, ...], num_steps: int) -> tuple[int, ...]:
    """The branches per level, no more than are needed beside those of the levels below."""
    found, leaves = [], 1
    for number in reversed(numbers):
        found.append(min(number, -(-num_steps // leaves)))
        leaves *= found[-1]
    return tuple(reversed(found))


def branches(num_steps: int, arity: int) -> tuple[int, ...]:
    """The branches per level, from the root on, of a tree that has the steps as its leaves.

    They are ``arity``, and at the root as few as are needed; the product is at least ``num_steps``.
    """
    if num_steps == 1:
        return ()
    levels, leaves = 1, arity
    while leaves < num_steps:
        levels, leaves = levels + 1, leaves * arity
    return (-(-num_steps * arity // leaves), *[arity] * (levels - 1))


def _nested(
    body: Callable, carry: _Carry, inputs: tuple[jax.Array, _Data], numbers: tuple[int, ...]
) -> tuple[_Carry, jax.Array]:
    """Scans over a tree: each level keeps its branches' first states and computes the rest again.

    Where the tree has more leaves than there are steps, the last ones do nothing.
    """
    num_steps, leaves = len(inputs[0]), math.prod(numbers)
    length = -(-num_steps // leaves)

    def step(carry, i):
        def run(carry):
            now = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), inputs)
            return body(carry, now)

        if leaves * length == num_steps:
            return run(carry)

        def skip(carry):
            out = jax.eval_shape(run, carry)[1]
            return carry, mesh_axes.like(out, jnp.zeros(out.shape, out.dtype))

        return jax.lax.cond(i < num_steps, run, skip, carry)

    def over(branch, number, steps):
        def run(carry, first):
            return jax.lax.scan(branch, carry, first + steps * jnp.arange(number, dtype=jnp.int32))

        return run

    run, steps = (step, 1) if length == 1 else (over(step, length, 1), length)
    kept = (INNER_GRADIENT,) if length == 1 else ()
    for number in reversed(numbers):
        run, steps, kept = over(_remade(run, *kept), number, steps), steps * number, ()
    carry, out = run(carry, jnp.int32(0))
    return carry, out.ravel()[:num_steps]


def repeat(step: Callable[[_Carry], _Carry], carry: _Carry, times: int) -> _Carry:
    """Runs ``step(carry) -> carry`` so many times.

    ``jax.disable_jit`` refuses a scan of no steps, so none is made.
    """
    if times == 0:
        return carry
    return jax.lax.scan(lambda carry, _: (step(carry), None), carry, length=times)[0]


def _remade(body: Callable, *kept: str) -> Callable:
    """Wraps ``body`` so that backpropagation computes its results again from its arguments.

    Values of the names ``kept`` are not computed again.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*kept) if kept else None
    # A scan has nothing to merge it with.
    return jax.checkpoint(body, prevent_cse=False, policy=policy)


def reset(
    episode: Episode, theta: Theta, begin: Callable[[Episode, Theta], _Carry], carried: _Carry
) -> _Carry:
    """Returns ``begin(episode, theta)`` where t is 0, and ``carried`` elsewhere.

    A ``while_loop`` that runs zero or one time: it overwrites the carried state in place, and under
    ``vmap`` it runs ``begin`` only if one of the episodes is at its start; a ``cond`` always does.
    JAX differentiates it forwards only; ``backprop`` goes back through ``init`` in a second one. An
    estimate is therefore differentiable backwards only where neither ``init`` nor ``carried``
    depends on what is differentiated.
    """
    first, impl = episode.t == 0, jax.random.key_impl(episode.key)
    given = jax.random.key_data(episode.key), theta
    # Inside `shard_map` a carry varies over the same axes before and after the loop's body.
    inside = mesh_axes.axes((first, given, carried))
    shapes = jax.eval_shape(begin, episode, theta) if inside else carried

    def alike(tree):
        tree = mesh_axes.like(shapes, mesh_axes.like(carried, tree))
        return mesh_axes.over(mesh_axes.axes(first), tree)

    def turn(carry):
        # XLA moves loop invariants out of the loop, where they would begin an episode in every
        # call. The barrier makes key and theta depend on `waiting`, which the loop changes. Under
        # vmap, workers whose `waiting` is False drop the new episode.
        waiting, _ = carry
        waiting, (data, here) = jax.lax.optimization_barrier((waiting, given))
        own = episode._replace(key=jax.random.wrap_key_data(data, impl=impl))
        return jnp.zeros_like(waiting), alike(begin(own, here))

    return jax.lax.while_loop(lambda carry: carry[0], turn, (first, alike(carried)))[1]


class Window(NamedTuple):
    """One window of one trajectory.

    Attributes:
        state: The inner state at the end.
        losses: The losses of the steps, shape ``(num_steps,)``.
        start: (T/K) times ``evaluate`` at the start, 0 in an episode's first window; None without
            ``evaluate``.
        end: (T/K) times ``evaluate`` at the end; None without ``evaluate``.
    """

    state: State
    losses: jax.Array
    start: jax.Array | None
    end: jax.Array | None

    def loss(self) -> jax.Array:
        """Returns the window's part of J; averaged over an episode's windows it is J."""
        mean = jnp.mean(self.losses)
        if self.start is None or self.end is None:
            return mean
        with standard_promotion():
            return mean + self.end - self.start


def enter(segment: Segment, theta: Theta, state: State | None) -> State:
    """Returns the inner state at the segment's start: ``state``, or where t is 0 a new one.

    ``state`` is the end of the window before, or None if the segment is a whole episode.
    """
    begin = functools.partial(initial_state, segment.problem)
    if state is None:
        return begin(segment.episode, theta)
    return reset(segment.episode, theta, begin, state)


def window(
    segment: Segment,
    theta: Theta,
    state: State,
    start: Numeric | None = None,
    remat: Remat = None,
) -> Window:
    """Runs one window from ``state``, which ``enter`` returned; ``remat`` as in ``bptt``.

    ``start`` is the ``end`` of the window before; if it is None, the state is evaluated again.
    """
    problem, episode = segment.problem, segment.episode
    after, losses = unroll(segment, theta, state, remat)
    if problem.evaluate is None:
        return Window(after, losses, None, None)
    if start is None and segment.num_steps != problem.horizon:
        # The first window subtracts nothing: 0 times a gradient that is not finite would be NaN.
        first = episode.t == 0
        fixed = jax.tree.map(
            lambda x: jnp.where(first, jax.lax.stop_gradient(x), x), (theta, state)
        )
        start = weigh(segment, evaluate(problem, episode, *fixed))
    end = weigh(segment, evaluate(problem, episode, theta, after))
    return Window(after, losses, since(segment, start, end), end)


def weigh(segment: Segment, evaluated: _Tree) -> _Tree:
    """Multiplies an evaluation at an end of the segment by T/K, an episode's number of windows."""
    horizon = inner_loop.static_horizon(segment.problem, "problem.evaluate")
    return jax.tree.map(lambda x: horizon / segment.num_steps * x, evaluated)


def since(segment: Segment, start: Numeric | ArrayTree | None, end: _Tree) -> _Tree:
    """Returns the value to subtract from ``end``: ``start``, but 0 in an episode's first window."""
    if start is None:
        return jax.tree.map(jnp.zeros_like, end)
    first = segment.episode.t == 0
    return jax.tree.map(lambda x: jnp.where(first, 0.0, x), start)


def episode_loss(
    problem: UnrolledProblem, key: Key, theta: Theta, *, data: _Data = None
) -> jax.Array:
    """Computes the loss of one whole episode, an unbiased sample of J(theta).

    Args:
        problem: The inner loop, with a static horizon.
        key: The episode's key; ``bptt(problem).estimate(key, ...)`` runs the same episode.
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

    @eager.compiled
    def run(key, theta, data):
        segment = Segment(problem, new_episode(horizon, key, horizon), horizon, data)
        return window(segment, theta, enter(segment, theta, None)).loss()

    return run(key, theta, data)


def _as_loss(loss: Numeric) -> jax.Array:
    loss = jnp.asarray(loss)
    return loss.astype(wide(loss))
