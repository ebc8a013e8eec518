"""What makes an estimator persist: noise held for a period, and the sum of all noise so far."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad import checks, unroll, varying
from unrollgrad.estimators import pairs, worker
from unrollgrad.noise import wide
from unrollgrad.types import Episode, Key, Theta, UnrolledProblem


class Weights(NamedTuple):
    """What weighs the differences of a window's losses.

    Attributes:
        now: All noise up to this window, this one's included.
        before: All noise up to the window before; zero in the first. It weighs the evaluation at
            the window's start.
        accumulated: The noise of the finished periods, to be carried on; None where a period is a
            whole episode.
        unit: This window's own noise.
    """

    now: Theta
    before: Theta
    accumulated: Theta | None
    unit: Theta


def check_period(noise_period: int | None, truncation: int) -> int | None:
    """The noise period, a multiple of the truncation; None is once per episode.

    Raises:
        ValueError: If it is not.
    """
    if noise_period is None:
        return None
    noise_period = checks.positive_int("noise_period", noise_period)
    if noise_period % truncation:
        raise ValueError(
            "`noise_period` must be a multiple of `truncation`; got "
            f"noise_period={noise_period} and truncation={truncation}. Use "
            f"{truncation * max(1, round(noise_period / truncation))}, or None for one draw "
            "per episode."
        )
    return noise_period


def noise_key(episode: Episode, noise_period: int | None) -> Key:
    """The key of the noise period in which the episode stands."""
    return unroll.noise_key(episode, 0 if noise_period is None else episode.t // noise_period)


def accumulate(
    t: jax.Array, truncation: int, noise_period: int | None, accumulated: Theta | None, unit: Theta
) -> Weights:
    """Adds a window's noise.

    Args:
        t: The window's first step.
        truncation: Its steps.
        noise_period: Steps between draws; None: one draw per episode.
        accumulated: The noise of the finished periods; ignored where t is 0.
        unit: The noise of this window's period.
    """
    if noise_period is None:
        # In the first window the evaluation at the start is 0, whatever weighs it.
        return Weights(unit, unit, None, unit)
    starts, ends = t % noise_period == 0, (t + truncation) % noise_period == 0
    finished = jax.tree.map(lambda a: jnp.where(t == 0, 0, a), accumulated)
    now = jax.tree.map(jnp.add, finished, unit)
    before = jax.tree.map(lambda f, w: jnp.where(starts, f, w), finished, now)
    carried = jax.tree.map(lambda f, w: jnp.where(ends, w, f), finished, now)
    return Weights(now, before, carried, unit)


def init_pairs(
    problem: UnrolledProblem,
    key: Key,
    theta: Theta,
    truncation: int,
    noise_period: int | None,
    num_pairs: int,
    made_by: worker.MadeBy,
) -> worker.PersistentState:
    """Pairs at the start of an episode, with an empty accumulator."""
    mean = worker.init_mean(problem, key, theta, truncation, made_by)

    def zeros(x):
        return jnp.zeros((num_pairs, *x.shape), wide(x.dtype))

    accumulated = None if noise_period is None else jax.tree.map(zeros, theta)
    evaluated = None
    if problem.evaluate is not None:
        loss = unroll.evaluate_shape(problem, mean.episode, theta, mean.state)
        evaluated = jnp.zeros((num_pairs, 2), loss.dtype)
    accumulated, evaluated = varying.over(varying.axes((key, theta)), (accumulated, evaluated))
    states = pairs.spread(mean.state, num_pairs)
    return worker.PersistentState(mean.episode, states, accumulated, evaluated, made_by)


def run_pairs(
    problem: UnrolledProblem,
    episode: Episode,
    sigma: Any,
    thetas: Theta,
    state: Any,
    truncation: int,
    noise_period: int | None,
    data: Any,
) -> tuple[unroll.Window, Weights]:
    """Runs one window of pairs that persist; the window, and what weighs its losses."""
    window = pairs.run(
        problem, episode, thetas, state.states, truncation, data, starts=state.evaluated
    )
    unit = pairs.realised(thetas, sigma, window.losses)
    noise = accumulate(episode.t, truncation, noise_period, state.accumulated, unit)
    return window, noise
