"""Workers at different windows of their episodes, so that each update sees all windows.

In lockstep all workers stand at the same window, and an update sees that window alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from unrollgrad._core import mesh_axes, unroll
from unrollgrad.types import Episode, WorkerState


def shorten_first(episode: Episode, index: jax.Array, num_workers: int, truncation: int) -> Episode:
    """Breakstep: ends worker i's first episode after ceil((i + 1) / num_workers * T/K) windows."""
    windows = episode.horizon // truncation
    first = windows - _share(num_workers - 1 - index, num_workers, windows)
    return episode._replace(horizon=truncation * first)


def end_first(before: Episode, after: Episode) -> Episode:
    """Breakstep: keeps a first episode to its shortened horizon.

    A call that begins an episode draws its horizon. In the first episode the horizon of ``init``
    replaces it; at the end of an episode the horizon becomes 0, so later ones are not replaced.
    """
    first = (before.t == 0) & (before.horizon > 0)
    horizon = jnp.where(first, before.horizon, after.horizon)
    t = jnp.where(after.t >= horizon, 0, after.t)
    return after._replace(t=t, horizon=jnp.where(t == 0, 0, horizon))


def burn_in(
    call: Callable[[jax.Array, WorkerState], WorkerState],
    state: WorkerState,
    index: jax.Array,
    num_workers: int,
    truncation: int,
) -> WorkerState:
    """Runs worker i for floor(i / num_workers * T/K) windows.

    ``call(number, state) -> state`` runs every worker for one window. ``state`` is the state of the
    fresh workers ``index`` out of ``num_workers``, with a leading axis; ``truncation`` is K.
    """

    def behind(state):
        windows = state.episode.horizon // truncation
        return state.episode.t < truncation * _share(index, num_workers, windows)

    def move(carry):
        number, state = carry
        return number + 1, jax.vmap(unroll.select)(behind(state), call(number, state), state)

    state = mesh_axes.like(jax.eval_shape(call, 0, state), state)
    return jax.lax.while_loop(lambda carry: jnp.any(behind(carry[1])), move, (0, state))[1]


def _share(index: jax.Array, num_workers: int, windows: jax.Array) -> jax.Array:
    """Computes floor(index / num_workers * windows); the product itself may exceed int32."""
    return windows // num_workers * index + windows % num_workers * index // num_workers
