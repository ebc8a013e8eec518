"""Makes an estimator from two functions; checks, episodes, state and ``jit`` are in one place.

``begin(episode, theta) -> carried`` makes the estimator's own state at the start of an episode;
``window(segment, theta, carried) -> (Estimate, carried)`` runs one stretch of the episode.
``windowed`` does the rest.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments, influence, inner_loop
from unrollgrad._core import mesh_axes, unroll
from unrollgrad._core.contexts import own_transfers
from unrollgrad.types import (
    ArrayTree,
    Episode,
    Estimate,
    GradientEstimator,
    Info,
    Key,
    MadeBy,
    Segment,
    Theta,
    UnrolledProblem,
    Worker,
)

Begin = Callable[[Episode, Theta], Any]
Window = Callable[[Segment, Theta, Any], tuple[Estimate, Any]]


def made_by(estimator: str, problem: UnrolledProblem, **settings: object) -> MadeBy:
    """Returns the fingerprint of an estimator's states: its name, its settings and the horizon."""
    inner_loop.check_problem(problem)
    horizon = "sampled" if callable(problem.horizon) else int(problem.horizon)
    return MadeBy(estimator, (*settings.items(), ("horizon", horizon)))


def estimate_of(grad: ArrayTree, loss: jax.Array, inner_steps: int) -> Estimate:
    """Makes an estimate that cost ``inner_steps`` forward inner steps."""
    return Estimate(grad, loss, Info(jnp.int32(min(inner_steps, 2**31 - 1))))


def windowed(
    problem: UnrolledProblem,
    fingerprint: MadeBy,
    truncation: int | None,
    begin: Begin,
    window: Window,
    check: Callable[[Theta], None] = lambda theta: None,
) -> GradientEstimator:
    """Makes an estimator that runs one window of ``truncation`` steps in each call.

    Args:
        problem: The inner loop.
        fingerprint: The estimator and settings that its states name as their maker.
        truncation: Inner steps per call; None: every call is a whole episode.
        begin: ``begin(episode, theta)`` makes the carried state at the start of an episode.
        window: ``window(segment, theta, carried)`` estimates from one stretch.
        check: ``check(theta)`` raises if the settings do not fit theta's values.
    """
    axis = "horizon" if truncation is None else "truncation"
    num_steps = truncation or inner_loop.static_horizon(problem, fingerprint.estimator)

    @own_transfers()
    def init(key: Key, theta: Theta) -> Worker:
        theta = arguments.floating_theta(theta)
        check(theta)
        episode = unroll.new_episode(problem.horizon, arguments.typed_key(key), num_steps)
        carried = begin(episode, theta)
        names = mesh_axes.axes((key, theta))
        return Worker(episode, mesh_axes.over(names, carried), fingerprint)

    def estimate(key: Key, theta: Theta, state: Worker, *, data: ArrayTree | None = None):
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
        arguments.check_data(data, num_steps, axis)
        influence.check_theta(theta, *inner_loop.check_step(problem, key, theta, data))
        arguments.check_worker_state(state, jax.eval_shape(init, key, theta))
        # Inside `shard_map` the key and theta vary over every axis over which an argument varies.
        names = mesh_axes.axes((key, theta, state, data))
        key, theta = mesh_axes.over(names, (key, theta))
        if truncation is None:
            episode = unroll.new_episode(problem.horizon, key, num_steps)
        else:
            episode = unroll.continue_or_begin(problem.horizon, key, state.episode, num_steps)
        segment = Segment(problem, episode, num_steps, data)
        out, carried = window(segment, theta, state.carried)
        return out, Worker(unroll.advance(episode, num_steps), carried, fingerprint)

    # Without `jit`, each call outside of one would compile the scan over inner steps again.
    return GradientEstimator(init, jax.jit(estimate), truncation)


def nothing(episode: Episode, theta: Theta) -> None:
    """The ``begin`` of an estimator that carries nothing: every call is a whole episode."""


def inner_state(problem: UnrolledProblem) -> Begin:
    """Makes the ``begin`` of an estimator that carries one inner state, under theta itself."""

    def begin(episode, theta):
        return unroll.initial_state(problem, episode, theta)

    return begin
