"""The mean of estimators of several problems with one theta: families of tasks side by side."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad.types import AverageInfo, Episode, Estimate, GradientEstimator, Key, Theta


class MixtureState(NamedTuple):
    """The state of a ``mean_of``.

    Attributes:
        episode: The first one's.
        states: All of them.
    """

    episode: Episode
    states: tuple[Any, ...]


def mean_of(estimators: Sequence[GradientEstimator]) -> GradientEstimator:
    """Estimates the gradient of the mean of their J, from averages over workers."""
    count = len(estimators)
    if count == 1:
        return estimators[0]

    def init(key, theta):
        keys = jax.random.split(key, count)
        states = tuple(e.init(k, theta) for e, k in zip(estimators, keys, strict=True))
        return MixtureState(states[0].episode, states)

    def total(values: Iterable[jax.Array]) -> jax.Array:
        return jnp.sum(jnp.stack(list(values)), axis=0)

    def estimate(key: Key, theta: Theta, state: MixtureState, *, data: Any = None) -> Any:
        if data is not None:
            raise ValueError("a mixture takes no `data`.")
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
