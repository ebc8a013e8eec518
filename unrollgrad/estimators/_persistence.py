"""What makes an estimator persist: noise held for a period, and the sum of all noise so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad._core import unroll
from unrollgrad._core.dtypes import wide
from unrollgrad.estimators import _pairs
from unrollgrad.types import Episode, Key, Segment, State, Theta, UnrolledProblem


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
    noise_period = arguments.positive_int("noise_period", noise_period)
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


class Persistent(NamedTuple):
    """What a worker carries whose pairs keep their own inner states.

    Attributes:
        states: Inner states, leading axes ``(num_pairs, 2)``: theta + eps, theta - eps.
        accumulated: The unit-variance noise of the finished periods, summed; leading axis
            ``num_pairs``. None where a period is a whole episode.
        evaluated: (T/K) ``evaluate`` at the end of the last window, ``(num_pairs, 2)``; None
            without ``evaluate``.
    """

    states: State
    accumulated: Theta | None
    evaluated: jax.Array | None


class Persistence(NamedTuple):
    """How pairs persist: who they are, and how long they hold their noise.

    Attributes:
        problem: The inner loop.
        pairs: How theta is perturbed.
        noise_period: Inner steps between draws, a multiple of the truncation; None: one draw per
            episode.
    """

    problem: UnrolledProblem
    pairs: _pairs.Pairs
    noise_period: int | None

    def begin(self, episode: Episode, theta: Theta) -> Persistent:
        """Pairs at the start of an episode, with an empty accumulator."""
        num_pairs = self.pairs.num_pairs
        state = unroll.initial_state(self.problem, episode, theta)

        def zeros(x):
            return jnp.zeros((num_pairs, *x.shape), wide(x.dtype))

        accumulated = None if self.noise_period is None else jax.tree.map(zeros, theta)
        evaluated = None
        if self.problem.evaluate is not None:
            loss = unroll.evaluate_shape(self.problem, episode, theta, state)
            evaluated = jnp.zeros((num_pairs, 2), loss.dtype)
        return Persistent(_pairs.spread(state, num_pairs), accumulated, evaluated)

    def run(
        self, segment: Segment, theta: Theta, carried: Persistent
    ) -> tuple[unroll.Window, Weights, Persistent]:
        """Runs one window of every pair: the window, its weights, and what is carried on."""
        t, sigma = segment.episode.t, self.pairs.sigma
        key = noise_key(segment.episode, self.noise_period)
        thetas = _pairs.draw(self.pairs, theta, key)
        window = _pairs.run(segment, thetas, carried.states, carried.evaluated)
        unit = _pairs.realised(thetas, sigma, window.losses)
        noise = accumulate(t, segment.num_steps, self.noise_period, carried.accumulated, unit)
        return window, noise, Persistent(window.state, noise.accumulated, window.end)
