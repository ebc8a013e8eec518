"""Backpropagation that walks back step by step, with states that were kept or are made again.

JAX's own reverse mode differentiates a fixed number of steps from stored values. Here the number
may be drawn (a law), and the states may be made again by an inverse of the step. A walk takes the
k-th step from the end: its state before, one vector-Jacobian product, and its share of the
gradient times a weight.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import eager, mesh_axes, unroll
from unrollgrad._core.dtypes import standard_promotion
from unrollgrad._core.float_leaves import floats_of, split
from unrollgrad.estimators._window import estimate_of
from unrollgrad.types import ArrayTree, Estimate, Key, Numeric, Segment, State, Theta

Law = Callable[[Key], Numeric]
"""A law of the number of differentiated steps: draws it."""

Last = int | Law | None
"""The number of differentiated steps, a law of it, or None for all."""

_DRAWS = 2**20


def check(last: Last, unbiased: bool, remat: Any, inverse: Any) -> None:
    """Raises ValueError if the settings of ``bptt`` contradict each other."""
    if not (isinstance(remat, str) and remat == "reverse"):
        inner_loop.check_remat(remat, 'or, with `inverse`, "reverse"')
        if inverse is not None:
            raise ValueError(
                f'`inverse` is for remat="reverse"; got remat={remat!r}. Set it or leave out '
                "`inverse`."
            )
    elif not callable(inverse):
        raise ValueError(
            '`remat`="reverse" needs `inverse`, a function (key, theta, state, t) -> the state '
            f"before step t; got inverse={inverse!r}. samplers.inverse makes that of a sampler."
        )
    if not callable(last):
        if unbiased:
            raise ValueError(
                f"`unbiased` is for a law `last(key)`; got last={last!r}, whose steps before the "
                "last ones are never seen. Use for example last=samplers.cutoff([1 / T] * T)."
            )
    elif remat not in (None, "step", "reverse"):
        raise ValueError(
            f'a law `last` keeps the state of every step; got remat={remat!r}. Use "step", or '
            '"reverse" with an inverse.'
        )


def window(
    horizon: int, last: int | Law, unbiased: bool, inverse: Callable[..., State] | None
) -> Callable[[Segment, Theta], Estimate]:
    """Makes ``(segment, theta) -> Estimate`` that walks back from the end of an episode."""
    weights = _weights(last, horizon) if unbiased and callable(last) else np.ones(horizon)

    def run(segment, theta):
        steps: Numeric
        if callable(last):
            drawn = last(unroll.noise_key(segment.episode, 0))
            steps = jnp.clip(jnp.asarray(drawn, jnp.int32), 1, horizon)
        else:
            steps = last
        return _walk(segment, theta, inverse, steps, jnp.asarray(weights))

    return run


class _Back(NamedTuple):
    """What a walk carries: the state after a step, the loss's slope in it, and theta's gradient."""

    state: State
    slope: list[jax.Array]
    grad: ArrayTree


def _walk(segment, theta, inverse, steps, weight) -> Estimate:
    problem, episode, horizon = segment.problem, segment.episode, segment.num_steps
    names = mesh_axes.axes((episode.key, theta))

    def initial(theta):
        state = unroll.initial_state(problem, episode, theta)
        return floats_of(state), state

    _, through_init, first = jax.vjp(initial, theta, has_aux=True)

    def forward(state, key, t, batch):
        after, loss = unroll.one_step(problem, key, theta, state, t, batch)
        return after, (loss, None if inverse else state)

    after, (losses, kept) = unroll.scan(segment, forward, first)
    value, slope, grad = _at_the_end(segment, theta, after)

    def back(k, carry):
        """Takes step ``horizon - 1 - k`` back."""
        t = jnp.asarray(horizon - 1 - k, jnp.int32)
        key, batch = unroll.step_key(episode, t), _slice(segment.data, t)
        if inverse is None:
            before = jax.tree.map(lambda x: x[t], kept)
        else:
            extra = () if batch is None else (batch,)
            made = inverse(key, theta, carry.state, t, *extra)
            before = _like(arguments.strong_state(made, made_by="inverse"), carry.state)
        floats, rebuild = split(before)

        def step(theta, floats):
            state, loss = unroll.one_step(problem, key, theta, rebuild(floats), t, batch)
            return floats_of(state), loss

        (_, loss), pull = jax.vjp(step, theta, floats)
        part, slope = pull((carry.slope, jnp.asarray(1 / horizon, loss.dtype)))
        grad = jax.tree.map(lambda g, x: g + _times(weight[k], x), carry.grad, part)
        return mesh_axes.over(names, _Back(before, slope, grad))

    start = mesh_axes.over(names, _Back(after, slope, grad))
    end = jax.lax.fori_loop(0, steps, back, start)
    from_init = through_init(end.slope)[0]
    # A zero times a slope that is not finite would be NaN.
    from_init = jax.tree.map(
        lambda x: jnp.where(steps == horizon, _times(weight[-1], x), jnp.zeros_like(x)), from_init
    )
    with standard_promotion():
        loss = jnp.mean(losses) + value
    return estimate_of(jax.tree.map(jnp.add, end.grad, from_init), loss, horizon)


def _times(weight: jax.Array, x: jax.Array) -> jax.Array:
    """The product, in x's dtype but no narrower than the weight while it is computed."""
    with standard_promotion():
        return (weight * x).astype(x.dtype)


def _at_the_end(segment, theta, state):
    """The evaluation of the last state, its slope in the state, and its gradient in theta."""
    floats, rebuild = split(state)
    if segment.problem.evaluate is None:
        zeros = jax.tree.map(jnp.zeros_like, (floats, theta))
        return 0.0, *zeros

    def value(theta, floats):
        return unroll.evaluate(segment.problem, segment.episode, theta, rebuild(floats))

    out, pull = jax.vjp(value, theta, floats)
    grad, slope = pull(jnp.ones_like(out))
    return out, slope, grad


def _slice(data, t):
    return None if data is None else jax.tree.map(lambda x: jnp.asarray(x)[t], data)


def _like(before: State, after: State) -> State:
    """The state; raises TypeError if it does not look like the state after it."""
    differences = arguments.state_differences(after, before)
    if differences:
        raise TypeError(
            "`inverse` must return a state with the structure, shapes and dtypes that it was "
            f"given; it changed:\n{differences}"
        )
    return before


def _weights(law: Law, horizon: int) -> np.ndarray:
    """1 / P(m >= k) for k = 1, ..., horizon.

    Raises:
        ValueError: If the law never differentiates all steps.
    """
    chances = getattr(law, "probabilities", None)
    if chances is None:

        def count(key):
            drawn = jax.vmap(law)(jax.random.split(key, _DRAWS))
            return jnp.bincount(jnp.clip(drawn, 1, horizon) - 1, length=horizon)

        with jax.ensure_compile_time_eval():
            chances = np.asarray(eager.compiled(count)(jax.random.key(0))) / _DRAWS
    full = np.zeros(max(horizon, len(chances)))
    full[: len(chances)] = chances
    survival = np.cumsum(full[::-1])[::-1][:horizon]
    if not survival[-1] > 0:
        raise ValueError(
            f"`unbiased=True` needs a law that differentiates all {horizon} steps now and then; "
            f"the largest number it draws is {np.flatnonzero(full)[-1] + 1}. Give {horizon} a "
            "probability, as samplers.cutoff([1 / T] * T) does."
        )
    return 1 / survival
