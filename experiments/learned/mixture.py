"""The mean of gradient estimators for several problems (families of tasks) with one theta."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from unrollgrad.types import (
    AverageInfo,
    Episode,
    Estimate,
    GradientEstimator,
    Key,
    Theta,
    WorkerState,
)


class MixtureState(NamedTuple):
    """The state of a ``mean_of``.

    Attributes:
        episode: The episode of the first estimator.
        states: The states of all estimators.
    """

    episode: Episode
    states: tuple[WorkerState, ...]


def mean_of(estimators: Sequence[GradientEstimator]) -> GradientEstimator:
    """Estimates the gradient of the problems' mean J; each estimator is an ``average``."""
    count = len(estimators)
    if count == 1:
        return estimators[0]

    def init(key, theta):
        keys = jax.random.split(key, count)
        states = tuple(e.init(k, theta) for e, k in zip(estimators, keys, strict=True))
        return MixtureState(states[0].episode, states)

    def total(values: Iterable[jax.Array]) -> jax.Array:
        return jnp.sum(jnp.stack(list(values)), axis=0)

    def estimate(
        key: Key, theta: Theta, state: MixtureState, *, data: chex.ArrayTree | None = None
    ) -> tuple[Estimate, MixtureState]:
        if data is not None:
            raise ValueError("a mixture does not accept `data`.")
        keys = jax.random.split(key, count)
        found = [
            e.estimate(k, theta, s) for e, k, s in zip(estimators, keys, state.states, strict=True)
        ]
        out, states = zip(*found, strict=True)
        grad = jax.tree.map(lambda *g: total(g) / count, *(o.grad for o in out))
        info = AverageInfo(
            inner_steps=total(o.info.inner_steps for o in out),
            num_nonfinite=total(o.info.num_nonfinite for o in out),
            grad_variance=total(o.info.grad_variance for o in out) / count**2,
        )
        loss = total(o.loss for o in out) / count
        return Estimate(grad, loss, info), MixtureState(states[0].episode, states)

    return GradientEstimator(init, estimate, estimators[0].truncation)
