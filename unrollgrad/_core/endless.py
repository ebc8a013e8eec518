"""Makes a ``GradientEstimator`` of an algorithm that begins once and never ends."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes, unroll
from unrollgrad._core.contexts import own_transfers
from unrollgrad._core.descriptions import About
from unrollgrad.types import (
    ArrayTree,
    Episode,
    Estimate,
    GradientEstimator,
    Key,
    MadeBy,
    Theta,
    Worker,
)

_FOREVER = 2**31 - 1


def endless(
    fingerprint: MadeBy,
    begin: Callable[[Episode, Theta], Any],
    step: Callable[[Episode, Theta, Any], tuple[Estimate, Any]],
    *,
    batches: str,
    explain: Callable[[dict[str, Any]], str] | None = None,
) -> GradientEstimator:
    """Makes an estimator that begins in ``init`` and never ends.

    ``episode.t`` is the number of the next call, from 1 on; 0 makes that call begin again, with its
    own key, as ``average`` asks for after a gradient that is not finite. Otherwise the keys of
    calls are not used: all draws come from the key of ``init``. ``batches`` says where users pass
    their data, and ``explain`` is what ``About`` has.
    """

    @own_transfers()
    def init(key: Key, theta: Theta) -> Worker:
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
        episode = Episode(key, jnp.ones((), jnp.int32), jnp.int32(_FOREVER))
        names = mesh_axes.axes((key, theta))
        episode = mesh_axes.over(names, jax.tree.map(arguments.strong, episode))
        # Copies: a state that is donated must not take theta with it.
        carried = jax.tree.map(jnp.copy, mesh_axes.over(names, begin(episode, theta)))
        return Worker(episode, carried, fingerprint)

    def estimate(key: Key, theta: Theta, state: Worker, *, data: ArrayTree | None = None):
        if data is not None:
            raise ValueError(
                f"`{fingerprint.estimator}` draws its own batches; got `data`. Pass them as "
                f"{batches}, and leave `data` out."
            )
        key, theta = arguments.typed_key(key), arguments.floating_theta(theta)
        arguments.check_worker_state(state, jax.eval_shape(init, key, theta))
        names = mesh_axes.axes((key, theta, state))
        key, theta, state = mesh_axes.over(names, (key, theta, state))
        again = state.episode._replace(key=key)
        episode = unroll.select(state.episode.t == 0, again, state.episode)
        carried = unroll.reset(episode, theta, begin, state.carried)
        out, carried = step(episode, theta, carried)
        t = jnp.where(episode.t < _FOREVER, jnp.maximum(episode.t, 1) + 1, episode.t)
        return out, Worker(episode._replace(t=t), carried, fingerprint)

    init.about = About(str(fingerprint), explain=explain)  # type: ignore[attr-defined]
    return GradientEstimator(init, jax.jit(estimate))
