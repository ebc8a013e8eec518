"""What one worker carries between calls, how it begins, and what every call checks first."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from unrollgrad import checks, problem_checks, reach, unroll, varying
from unrollgrad.types import (
    Episode,
    EstimateFn,
    GradientEstimator,
    Key,
    State,
    Theta,
    UnrolledProblem,
    WorkerState,
)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MadeBy:
    """What a state fits besides its shapes. It is part of the state's structure, no leaf of it.

    Attributes:
        estimator: Its name.
        settings: Those without which the state would mean something else, as (name, value). Sigma
            is not among them: it may change between calls.
    """

    estimator: str
    settings: tuple[tuple[str, Any], ...]

    def __str__(self):
        return f"{self.estimator}({', '.join(f'{k}={v}' for k, v in self.settings)})"


def made_by(estimator: str, problem: UnrolledProblem, **settings: Any) -> MadeBy:
    """The fingerprint of an estimator's states: its name, settings and the horizon."""
    horizon = "sampled" if callable(problem.horizon) else int(problem.horizon)
    return MadeBy(estimator, (*settings.items(), ("horizon", horizon)))


class EpisodeState(NamedTuple):
    """The state of a worker whose every call is a whole episode."""

    episode: Episode
    made_by: MadeBy


class MeanState(NamedTuple):
    """The state of a worker that carries one inner state, advanced with theta itself.

    Attributes:
        episode: Where it stands.
        state: The inner state.
        made_by: The estimator whose it is.
    """

    episode: Episode
    state: State
    made_by: MadeBy


class PersistentState(NamedTuple):
    """The state of a worker whose pairs keep their own inner states.

    Attributes:
        episode: Where it stands.
        states: Inner states, leading axes ``(num_pairs, 2)``: theta + eps, theta - eps.
        accumulated: The unit-variance noise of the finished periods, summed; leading axis
            ``num_pairs``. None where a period is a whole episode.
        evaluated: (T/K) ``evaluate`` at the end of the last window, ``(num_pairs, 2)``; None
            without ``evaluate``.
        made_by: The estimator whose it is.
    """

    episode: Episode
    states: State
    accumulated: Theta | None
    evaluated: jax.Array | None
    made_by: MadeBy


def init_episode(
    problem: UnrolledProblem, key: Key, theta: Theta, horizon: int, made_by: MadeBy
) -> EpisodeState:
    """A worker state at t = 0 without an inner state."""
    checks.floating_theta(theta)
    return EpisodeState(unroll.new_episode(problem, checks.typed_key(key), horizon), made_by)


def init_mean(
    problem: UnrolledProblem, key: Key, theta: Theta, truncation: int, made_by: MadeBy
) -> MeanState:
    """A worker state at t = 0 with one inner state, which the first call replaces."""
    theta = checks.floating_theta(theta)
    episode = unroll.new_episode(problem, checks.typed_key(key), truncation)
    return MeanState(episode, unroll.initial_state(problem, episode, theta), made_by)


def admit(
    problem: UnrolledProblem,
    init: Callable[[Key, Theta], WorkerState],
    key: Key,
    theta: Theta,
    state: WorkerState,
    data: Any,
    num_steps: int,
    axis: str,
) -> tuple[Key, Theta]:
    """Checks the arguments of ``estimate``, and the problem's step on them.

    Returns:
        The typed key, and theta as strongly typed arrays; inside ``shard_map`` both vary over all
        axes over which the key, the state or the data do.

    Raises:
        TypeError: If an argument is not what it should be, or the state is another estimator's.
        ValueError: For theta without leaves, or data of another length.
    """
    key, theta = checks.typed_key(key), checks.floating_theta(theta)
    checks.check_data(data, num_steps, axis)
    reach.check_theta(theta, *problem_checks.check_step(problem, key, theta, data))
    checks.check_worker_state(state, jax.eval_shape(init, key, theta))
    names = varying.axes((key, theta, state, data))
    return varying.over(names, (key, theta))


def compiled(
    init: Callable[[Key, Theta], WorkerState], estimate: EstimateFn, truncation: int | None
) -> GradientEstimator:
    """The estimator, with its ``estimate`` under ``jit``.

    Called outside any ``jit`` the scan over inner steps would otherwise compile anew every time;
    inside one this changes nothing.
    """
    return GradientEstimator(init, jax.jit(estimate), truncation)
