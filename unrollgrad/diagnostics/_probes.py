"""The two programs of a diagnosis: slopes of the windows' losses, and gradients by backpropagation.

Both run whole episodes at a frozen theta. What differs between the estimators is data of these
programs: which windows are perturbed, by which draw, and what crosses from one window to the next.
So one compilation serves all estimators, all noise periods and all values of sigma.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks.inner_loop import static_horizon
from unrollgrad._core import unroll
from unrollgrad._core.dtypes import wide
from unrollgrad._core.float_leaves import split
from unrollgrad.noise import rademacher, sample
from unrollgrad.types import Key, Segment, State, Theta, UnrolledProblem

__all__ = [
    "Gradients",
    "Schedule",
    "Slopes",
    "backprop_gradients",
    "schedule",
    "window_slopes",
]


class Schedule(NamedTuple):
    """How the lanes of one episode are perturbed; every array is (lanes, windows).

    Attributes:
        scale: The perturbation in this window, in units of sigma; 0 leaves theta alone.
        draw: The number of the draw of signs that perturbs this window. Draw 0 is the direction
            that the caller knows.
        restart: Whether the window starts from the state under theta itself.
    """

    scale: np.ndarray
    draw: np.ndarray
    restart: np.ndarray

    def padded(self, lanes: int) -> "Schedule":
        """Repeats the last lane, so that schedules of different lengths share a program."""
        rows = np.minimum(np.arange(lanes), len(self.scale) - 1)
        return Schedule(*(x[rows] for x in self))


def schedule(scale: np.ndarray, *, draw: object = 0, restart: object = False) -> Schedule:
    """Makes a schedule from the scales; the other two are broadcast to them."""
    scale = np.asarray(scale, np.float32)
    draw = np.broadcast_to(np.asarray(draw, np.int32), scale.shape)
    return Schedule(scale, draw, np.broadcast_to(np.asarray(restart, bool), scale.shape))


class Slopes(NamedTuple):
    """Half differences between the signs of every lane, over sigma; each is (lanes, windows).

    Attributes:
        losses: Those of the window's mean loss.
        starts: Those of (T/K) ``evaluate`` at the window's start; zeros without ``evaluate``.
        ends: Those of (T/K) ``evaluate`` at the window's end; zeros without ``evaluate``.
        loss: The episode's loss under theta itself, a scalar.
    """

    losses: jax.Array | np.ndarray
    starts: jax.Array | np.ndarray
    ends: jax.Array | np.ndarray
    loss: jax.Array | np.ndarray

    def persistent(self) -> np.ndarray:
        """The windows' slopes where states persist; the final evaluation is the last window's.

        Persistent estimators weigh ``evaluate`` so that all noise of the episode weighs its end and
        what was in between cancels.
        """
        total = np.array(self.losses, np.float64)
        total[..., -1] += np.asarray(self.ends, np.float64)[..., -1]
        return total

    def own(self) -> np.ndarray:
        """The windows' slopes where a window counts the change of ``evaluate`` in it."""
        parts = (np.asarray(x, np.float64) for x in (self.losses, self.starts, self.ends))
        losses, starts, ends = parts
        return losses + ends - starts


def window_slopes(problem: UnrolledProblem, truncation: int, exact: bool = False) -> Any:
    """Makes ``slopes(schedule, sigma, theta, keys) -> Slopes``, compiled.

    The keys, of episodes and of directions of random signs, have a leading axis, and so have the
    results. ``exact``: derivatives in forward mode in place of differences at sigma.
    """
    one = functools.partial(_exact if exact else _paired, problem, truncation)
    return jax.jit(jax.vmap(one, in_axes=(None, None, None, 0)))


def _perturbed(theta: Theta, key: Key, draw: jax.Array, size: jax.Array) -> Theta:
    """Theta plus ``size`` times the signs of a draw, rounded to theta's dtypes."""
    unit = sample(rademacher(), jax.random.fold_in(key, draw), theta, 1)

    def leaf(x, u):
        u = u[0].astype(wide(x.dtype))
        return (x.astype(u.dtype) + size.astype(u.dtype) * u).astype(x.dtype)

    return jax.tree.map(leaf, theta, unit)


def _segment(problem: UnrolledProblem, episode, truncation: int, k: jax.Array) -> Segment:
    here = episode._replace(t=episode.t + jnp.int32(truncation) * k)
    return Segment(problem, here, truncation)


def _starts_and_ends(window: unroll.Window) -> tuple[jax.Array, jax.Array]:
    zero = jnp.zeros((), window.losses.dtype)
    start = zero if window.start is None else window.start.astype(zero.dtype)
    end = zero if window.end is None else window.end.astype(zero.dtype)
    return start, end


def _paired(problem, truncation, schedule, sigma, theta, keys):
    """The slopes of one episode from antithetic pairs, a pair for each lane of the schedule."""
    horizon, (episode_key, direction_key) = static_horizon(problem, "diagnose"), keys
    episode = unroll.new_episode(horizon, episode_key, truncation)
    lanes = len(schedule.scale)
    signs = jnp.concatenate([jnp.ones(lanes), -jnp.ones(lanes), jnp.zeros(1)])

    def everyone(x):  # both signs of every lane, then theta itself
        return jnp.concatenate([x, x, x[:1]])

    def initial(scale, draw, sign):
        perturbed = _perturbed(theta, direction_key, draw, sign * sigma * scale)
        return unroll.initial_state(problem, episode, perturbed)

    def window(states, inputs):
        k, scale, draw, restart = inputs
        segment = _segment(problem, episode, truncation, k)
        mean = jax.tree.map(lambda x: x[-1], states)

        def one(state, scale, draw, restart, sign):
            state = unroll.select(restart & (k > 0), mean, state)
            perturbed = _perturbed(theta, direction_key, draw, sign * sigma * scale)
            return unroll.window(segment, perturbed, state)

        out = jax.vmap(one)(states, everyone(scale), everyone(draw), everyone(restart), signs)
        starts, ends = jax.vmap(_starts_and_ends)(out)
        mean_losses = jnp.mean(out.losses, axis=1)
        half = jnp.mean((out.losses[:lanes] - out.losses[lanes:-1]) / 2, axis=1)
        slopes = [half / sigma, *((x[:lanes] - x[lanes:-1]) / (2 * sigma) for x in (starts, ends))]
        loss = mean_losses[-1] + ends[-1] - starts[-1]
        return out.state, (*slopes, loss)

    scale, draw = (everyone(x[:, 0]) for x in schedule[:2])
    states = jax.vmap(initial)(scale, draw, signs)
    steps = jnp.arange(horizon // truncation, dtype=jnp.int32)
    columns = (jnp.asarray(x).T for x in schedule)
    _, (losses, starts, ends, loss) = jax.lax.scan(window, states, (steps, *columns))
    return Slopes(losses.T, starts.T, ends.T, jnp.mean(loss))


def _exact(problem, truncation, schedule, sigma, theta, keys):
    """The limit of ``_paired`` for sigma to 0, in forward mode: one tangent for each lane."""
    horizon, (episode_key, direction_key) = static_horizon(problem, "diagnose"), keys
    episode = unroll.new_episode(horizon, episode_key, truncation)

    def lane(scale, draw, restart):
        def run(size):
            def window(state, inputs):
                k, scale, draw, restart = inputs
                segment = _segment(problem, episode, truncation, k)
                state = _gated(state, ~restart | (k == 0))
                perturbed = _perturbed(theta, direction_key, draw, size * scale)
                out = unroll.window(segment, perturbed, state)
                return out.state, (jnp.mean(out.losses), *_starts_and_ends(out))

            perturbed = _perturbed(theta, direction_key, draw[0], size * scale[0])
            state = unroll.initial_state(problem, episode, perturbed)
            steps = jnp.arange(horizon // truncation, dtype=jnp.int32)
            return jax.lax.scan(window, state, (steps, scale, draw, restart))[1]

        return jax.jvp(run, (jnp.zeros_like(sigma),), (jnp.ones_like(sigma),))

    (losses, starts, ends), slopes = jax.vmap(lane)(*map(jnp.asarray, schedule))
    return Slopes(slopes[0], slopes[1], slopes[2], jnp.mean((losses + ends - starts)[0]))


def _gated(state: State, gate: jax.Array) -> State:
    """The state itself, with its derivative where the gate is open."""
    floats, rebuild = split(state)
    return rebuild([jnp.where(gate, x, jax.lax.stop_gradient(x)) for x in floats])


class Gradients(NamedTuple):
    """Gradients of episodes by backpropagation; every array has a leading axis of episodes.

    Attributes:
        whole: The gradient of ``bptt``, a tree like theta.
        truncated: The gradient of ``tbptt``, averaged over the windows.
        along: The derivatives of both along the episode's direction, (2,).
    """

    whole: Theta
    truncated: Theta
    along: jax.Array


def backprop_gradients(problem: UnrolledProblem, truncation: int) -> Any:
    """Makes ``gradients(theta, episode_keys, direction_keys) -> Gradients``, compiled.

    An open gate lets the derivative cross from one window to the next, as ``bptt`` does; a closed
    one is ``tbptt``. Both take the same time here: backpropagation through the whole episode.
    """
    horizon = static_horizon(problem, "diagnose")

    def loss(theta, gate, key):
        episode = unroll.new_episode(horizon, key, truncation)

        def window(state, k):
            segment = _segment(problem, episode, truncation, k)
            state = _gated(state, gate | (k == 0))
            out = unroll.window(segment, theta, state)
            return out.state, out.loss()

        state = unroll.initial_state(problem, episode, theta)
        steps = jnp.arange(horizon // truncation, dtype=jnp.int32)
        return jnp.mean(jax.lax.scan(window, state, steps)[1])

    def one(theta, episode_key, direction_key):
        gates = jnp.array([True, False])
        both = jax.vmap(jax.grad(loss), in_axes=(None, 0, None))(theta, gates, episode_key)
        whole, truncated = (jax.tree.map(lambda x, i=i: x[i], both) for i in (0, 1))
        unit = sample(rademacher(), jax.random.fold_in(direction_key, 0), theta, 1)
        products = jax.tree.map(
            lambda g, u: jnp.sum((g * u[0].astype(g.dtype)).reshape(2, -1), axis=1), both, unit
        )
        return Gradients(whole, truncated, sum(jax.tree.leaves(products), jnp.zeros(2)))

    return jax.jit(jax.vmap(one, in_axes=(None, 0, 0)))
