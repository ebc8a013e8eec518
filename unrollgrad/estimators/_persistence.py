"""Persistent evolution strategies: noise held for a period, and the sum of all noise so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, inner_loop
from unrollgrad._core import unroll
from unrollgrad._core.descriptions import settings_of
from unrollgrad._core.dtypes import wide
from unrollgrad.estimators import _pairs
from unrollgrad.estimators._window import made_by, windowed
from unrollgrad.types import (
    ArrayTree,
    Episode,
    GradientEstimator,
    Key,
    Segment,
    State,
    Theta,
    UnrolledProblem,
)


class Weights(NamedTuple):
    """The noise that weighs the differences of a window's losses, as ``Pairs.weighing`` makes it.

    Of a law that draws factors, and of noise that is held for an episode, it is what was drawn.

    Attributes:
        now: The sum of all noise up to and including this window.
        before: The sum up to the previous window, zero in the first; it weighs the evaluation at
            the window's start.
        accumulated: The sum over finished periods, which the worker carries; None if a period is a
            whole episode.
        unit: This window's own noise.
    """

    now: ArrayTree
    before: ArrayTree
    accumulated: ArrayTree | None
    unit: ArrayTree


def check_period(noise_period: int | None, truncation: int) -> int | None:
    """Returns the noise period as an int, or None for one draw per episode.

    Raises:
        ValueError: If it is not a multiple of the truncation.
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
    """Returns the key of the episode's current noise period."""
    return unroll.noise_key(episode, 0 if noise_period is None else episode.t // noise_period)


def accumulate(
    t: jax.Array,
    truncation: int,
    noise_period: int | None,
    accumulated: ArrayTree | None,
    unit: ArrayTree,
) -> Weights:
    """Adds a window's noise to the sum.

    Args:
        t: The window's first step.
        truncation: The window's number of steps.
        noise_period: Inner steps between draws; None: one draw per episode.
        accumulated: The noise of the finished periods; ignored where t is 0.
        unit: The noise of this window's period.
    """
    if noise_period is None:
        # In the first window the evaluation at the start is 0, so its weight does not matter.
        return Weights(unit, unit, None, unit)
    starts, ends = t % noise_period == 0, (t + truncation) % noise_period == 0
    finished = jax.tree.map(lambda a: jnp.where(t == 0, 0, a), accumulated)
    now = jax.tree.map(jnp.add, finished, unit)
    before = jax.tree.map(lambda f, w: jnp.where(starts, f, w), finished, now)
    carried = jax.tree.map(lambda f, w: jnp.where(ends, w, f), finished, now)
    return Weights(now, before, carried, unit)


class Persistent(NamedTuple):
    """The carried state of a worker whose pairs keep their own inner states.

    Attributes:
        states: Inner states, leading axis ``2 num_pairs``: under all theta + eps, then theta - eps.
        accumulated: The sum of the finished periods' noise, each as its law weighed it, leading
            axis ``num_pairs``; None if a period is a whole episode, or if the law draws factors.
        evaluated: (T/K) ``evaluate`` at the end of the last window, shape ``(2 num_pairs,)``; None
            without ``evaluate``.
    """

    states: State
    accumulated: Theta | None
    evaluated: jax.Array | None


class Persistence(NamedTuple):
    """How pairs persist through an episode.

    Attributes:
        problem: The inner loop.
        pairs: How theta is perturbed.
        noise_period: Inner steps between draws; None: one draw per episode.
    """

    problem: UnrolledProblem
    pairs: _pairs.Pairs
    noise_period: int | None

    def begin(self, episode: Episode, theta: Theta) -> Persistent:
        """Returns pairs at the start of an episode, with an empty accumulator."""
        num_pairs, accumulated, evaluated = self.pairs.num_pairs, None, None
        state = unroll.initial_state(self.problem, episode, theta)
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (2 * num_pairs, *x.shape)), state)
        if self.noise_period is not None and not self.pairs.factored:
            accumulated = jax.tree.map(
                lambda x: jnp.zeros((num_pairs, *x.shape), wide(x.dtype)), theta
            )
        if self.problem.evaluate is not None:
            loss = unroll.evaluate_shape(self.problem, episode, theta, state)
            evaluated = jnp.zeros(2 * num_pairs, loss.dtype)
        return Persistent(states, accumulated, evaluated)

    def run(
        self, segment: Segment, theta: Theta, carried: Persistent
    ) -> tuple[unroll.Window, Weights, Persistent]:
        """Runs one window of every pair; returns it, its weights, and the new carried state."""
        t, sigma = segment.episode.t, self.pairs.sigma
        key = noise_key(segment.episode, self.noise_period)
        thetas = _pairs.draw(self.pairs, theta, key)
        window = _pairs.run(segment, thetas, carried.states, carried.evaluated)
        unit = _pairs.realised(thetas, sigma, window.losses)
        period = None if self.pairs.factored else self.noise_period
        if period is not None:
            unit = self.pairs.weighing(unit)
        noise = accumulate(t, segment.num_steps, period, carried.accumulated, unit)
        return window, noise, Persistent(window.state, noise.accumulated, window.end)

    def weigh(self, segment: Segment, theta: Theta, noise: Weights) -> _pairs.Weigh:
        """Makes ``weigh(ends, starts)``, in which the noise of all periods so far weighs the ends.

        Factors are not summed but drawn again, period by period: no state holds them.
        """
        t, period = segment.episode.t, self.noise_period
        if period is None:
            return self.pairs.weigh(noise.now, noise.before)
        if not self.pairs.factored:
            return self.pairs.summed().weigh(noise.now, noise.before)

        def weigh(ends, starts):
            def earlier(j, total):
                key = unroll.noise_key(segment.episode, j)
                unit = _pairs.difference(_pairs.draw(self.pairs, theta, key), self.pairs.sigma)
                mean = self.pairs.mean(unit, ends if starts is None else ends - starts)
                return jax.tree.map(jnp.add, total, mean)

            # The present period's noise weighs the start of a window only if it was there before.
            old = None if starts is None else jnp.where(t % period == 0, 0, starts)
            present = self.pairs.mean(noise.unit, ends if old is None else ends - old)
            return jax.lax.fori_loop(0, t // period, earlier, present)

        return weigh


def persistent_es(
    problem: UnrolledProblem, truncation: int, noise_period: int | None, pairs: _pairs.Pairs
) -> GradientEstimator:
    """Makes ``gpes``, and with it ``pes`` and ``es_single``."""
    truncation = inner_loop.check_truncation(problem, truncation)
    persistence = Persistence(problem, pairs, check_period(noise_period, truncation))

    def window(segment, theta, carried):
        result, noise, carried = persistence.run(segment, theta, carried)
        weigh = persistence.weigh(segment, theta, noise)
        return _pairs.estimate(result, pairs.sigma, theta, weigh), carried

    # `gpes` with the settings of `pes` or `es_single` has its name: they take each other's states.
    name = {truncation: "pes", None: "es_single"}.get(persistence.noise_period, "gpes")
    own = {"noise_period": persistence.noise_period} if name == "gpes" else {}
    own |= {"num_pairs": pairs.num_pairs, "noise": settings_of(pairs.law)}
    fingerprint = made_by(name, problem, truncation=truncation, **own)
    return windowed(problem, fingerprint, truncation, persistence.begin, window, pairs.check)
