"""How far the windows of an episode agree, and what that makes of every noise period's variance.

An episode's n windows are cut into stretches of equal length. ``influence[d, e, k, i]`` is the
derivative of J along the random direction u_d through the losses of stretch k, when theta is
perturbed in stretch i alone, in episode e of that direction: h_e[k, i].u_d. Since E[u u^T] = 1,
products of two such numbers along one direction have the inner product of the two gradients as
their mean, whatever P is. That is why one set of directions serves the whole Gram matrix. The
square of one gradient *estimate* (h.u) u would be about P times too large.

The variances are those of ``ug.problems.theory``, given the episode: with c[i, j] the influence of
noise period j on J through the losses of periods max(i, j) and later, the mean of ``gpes`` over an
episode has the variance P sum |c[i, j]|^2 + sum c[i, j].c[j, i]. In ``pes_analytic`` a window's
influence on itself is left out of h. In ``pes_analytic_replacement`` noise weighs only the losses
of later windows, so that c[i, j] is summed over those alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments, inner_loop, rounding
from unrollgrad.diagnostics import _probes
from unrollgrad.diagnostics.jackknife import leave_one_out, standard_error
from unrollgrad.types import Key, Theta, UnrolledProblem

__all__ = ["Windows", "exact_windows", "measure_windows", "stretch_length"]

EPISODES = 2
"""Episodes for each direction: products of two give the gradient's mean without their noise."""


class Windows(NamedTuple):
    """The influence of stretches of an episode on one another, along random directions.

    Attributes:
        influence: (D, E, m, m) as above; sums over k and i are derivatives of J along u_d.
        own: (D, E, n): h[k, k].u_d for every window, its own influence on its own loss, in units
            of J (a window is 1/n of it).
        fresh: (D, E, n): the windows' parts of J along fresh noise in every window; None if
            stretches are windows, which makes it superfluous.
        windows_per_stretch: The number of windows in a stretch.
        dim: P, the number of coordinates of theta.
        exact: Whether the directions are a basis, sqrt(P) e_p, so that means over them are exact.
    """

    influence: np.ndarray
    own: np.ndarray
    fresh: np.ndarray | None
    windows_per_stretch: int
    dim: int
    exact: bool = False

    def measured(self, samples: np.ndarray) -> np.ndarray:
        """The mean over the directions as a measured number, see ``jackknife``."""
        return np.mean(samples, axis=0, keepdims=True) if self.exact else leave_one_out(samples)

    def slope(self) -> np.ndarray:
        """The derivative of J along every direction, shape (D, E)."""
        return self.influence.sum(axis=(2, 3))

    def gram(self) -> np.ndarray:
        """<g_k, g_k'> of the mean gradients of the stretches' parts of J, as measured numbers.

        Products of different episodes: unbiased, whatever their noise. Shape (1 + D, m, m), first
        the matrix, then its jackknife replicates.
        """
        parts = self.influence.sum(axis=3)
        return self.measured(of_different_episodes(parts[..., :, None], parts[..., None, :]))

    def cosine(self) -> tuple[float, float]:
        """The mean cosine between the gradients of two stretches' parts, and its standard error.

        It is the mean inner product over the mean squared norm, so that stretches of little weight
        count little; 1 if there is a single stretch.
        """
        gram = self.gram()
        number = gram.shape[-1]
        if number == 1:
            return 1.0, 0.0
        norms = np.trace(gram, axis1=1, axis2=2) / number
        products = (gram.sum(axis=(1, 2)) - number * norms) / (number * (number - 1))
        found = products / norms
        return float(found[0]), standard_error(found)

    def variance(self, noise_period: int | None = None) -> np.ndarray:
        """The variance of ``gpes``, given the episode, with so many stretches in a noise period.

        Args:
            noise_period: Stretches between draws of the noise; None: one draw per episode, which is
                ``es_single``; 0: a draw in every *window*, which is ``pes``.

        Returns:
            A measured number, for one antithetic pair and Gaussian noise; see ``jackknife``.
        """
        if noise_period == 0 and self.fresh is not None:
            return self.measured(np.mean(self._fresh(), axis=1))
        number = self.influence.shape[-1]
        period = number if noise_period is None else max(noise_period, 1)
        return self._mean(lambda parts: _later(parts), period)

    def variance_with_backprop(self, replacement: bool = False) -> np.ndarray | None:
        """The variance of ``pes_analytic`` (or the replacement form), given the episode.

        None if a stretch is more than a window: it takes the Gram matrix of the windows.
        """
        if self.windows_per_stretch > 1:
            return None

        def later(parts):
            without = parts * (1 - np.eye(parts.shape[-1]))
            if not replacement:
                return _later(without)
            after = _later(parts) - parts  # c[i, j] through the losses after i
            return after * np.tril(np.ones(parts.shape[-1])) + np.triu(_own_later(without), 1)

        return self._mean(later, 1)

    def truncated_variance(self) -> np.ndarray:
        """The variance of ``truncated_es``, given the episode: fresh noise in every window."""
        return self.measured((self.dim + 1) * np.mean(np.sum(self.own**2, axis=2), axis=1))

    def _mean(self, later: Callable[[np.ndarray], np.ndarray], period: int) -> np.ndarray:
        c = later(_in_periods(self.influence, period))
        squares = np.sum(c**2, axis=(2, 3))
        products = np.sum(c * np.swapaxes(c, 2, 3), axis=(2, 3))
        return self.measured(np.mean(self.dim * squares + products, axis=1))

    def _fresh(self) -> np.ndarray:
        """As ``_mean``, from losses under fresh noise: their sums have the squares as their mean.

        What is added, at most 1/P of it, is taken from stretches.
        """
        assert self.fresh is not None
        later = np.cumsum(self.fresh[..., ::-1], axis=2)
        c = _later(self.influence)
        products = np.sum(c * np.swapaxes(c, 2, 3), axis=(2, 3))
        return self.dim * np.sum(later**2, axis=2) + products


def of_different_episodes(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean of a[d, e] b[d, e'] over e != e', for every direction; axes (D, E, ...)."""
    number = a.shape[1]
    if number == 1:
        return a[:, 0] * b[:, 0]
    total = a.sum(axis=1) * b.sum(axis=1) - np.sum(a * b, axis=1)
    return total / (number * (number - 1))


def _in_periods(parts: np.ndarray, period: int) -> np.ndarray:
    """Sums the influences over periods of so many stretches; the last may be shorter."""
    starts = np.arange(0, parts.shape[-1], period)
    return np.add.reduceat(np.add.reduceat(parts, starts, axis=-1), starts, axis=-2)


def _later(parts: np.ndarray) -> np.ndarray:
    """c[i, j] = the sum over k >= i of parts[k, j]; parts[k, j] is zero for k < j."""
    return np.cumsum(parts[..., ::-1, :], axis=-2)[..., ::-1, :]


def _own_later(without: np.ndarray) -> np.ndarray:
    """The sum over k > j of parts[k, j], at every [i, j]."""
    return np.broadcast_to(without.sum(axis=-2, keepdims=True), without.shape)


def exact_windows(influence: np.ndarray, truncation: int) -> Windows:
    """The windows of a problem whose influences are known: exact numbers in place of samples.

    Args:
        influence: (T, T, P) as in ``ug.problems.theory``.
        truncation: K.

    Returns:
        ``Windows`` along a basis of directions, whose means are exact, in one episode.
    """
    horizon, _, dim = influence.shape
    number = horizon // truncation
    split = influence.reshape(number, truncation, number, truncation, dim)
    parts = np.moveaxis(split.sum(axis=(1, 3)), -1, 0)[:, None] * np.sqrt(dim) / horizon
    return Windows(parts, np.einsum("dekk->dek", parts), None, 1, dim, exact=True)


def measure_windows(
    problem: UnrolledProblem,
    theta: Theta,
    *,
    key: Key,
    truncation: int,
    sigma: float | None = None,
    num_directions: int = 16,
) -> Windows:
    """Measures how the windows of an episode influence one another, from antithetic pairs.

    Each of the random directions has two episodes of its own. In each a pair is perturbed from the
    start of every stretch of windows on; the differences of neighbours are the influence of one
    stretch. The variance of every estimator of the ``gpes`` family follows from it, and is exact up
    to the noise of the directions if losses are quadratic. If they are not, ``es_single``'s is
    exact, and the others hold to first order in sigma.

    Time: two episodes for each direction, of 2 (m + 2) + 1 trajectories, with m stretches, at most
    12. Memory: as many states.

    Args:
        problem: The inner loop, with a static horizon.
        theta: The outer parameters at which everything is measured.
        key: The PRNG key.
        truncation: Inner steps in a window (K); divides the horizon.
        sigma: Half the distance of a pair, in theta's units; None: exact derivatives in forward
            mode, the limit of sigma to 0.
        num_directions: Directions of random signs, at least 3.

    Returns:
        ``Windows``, with ``gram()``, ``cosine()`` and ``variance(noise_period)``.

    Raises:
        ValueError: If the horizon is sampled, the truncation does not divide it, or sigma is not
            positive or under the resolution of theta.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta, _ = ug.problems.linear_recurrence(4, 8)  # all windows agree
        >>> windows = ug.diagnostics.measure_windows(
        ...     problem, theta, key=jax.random.key(0), truncation=2, sigma=0.1)
        >>> round(windows.cosine()[0], 3)
        1.0
    """
    horizon = inner_loop.static_horizon(problem, "measure_windows")
    truncation = inner_loop.check_truncation(problem, truncation)
    theta, key = arguments.floating_theta(theta), arguments.typed_key(key)
    if arguments.positive_int("num_directions", num_directions) < 3:
        raise ValueError(f"`num_directions` must be at least 3; got {num_directions}.")
    if sigma is not None:
        arguments.check_sigma(sigma)
        rounding.check(sigma, theta)
    slopes = _probes.window_slopes(problem, truncation, exact=sigma is None)
    size = jnp.float32(1.0 if sigma is None else sigma)
    lanes = window_lanes(horizon // truncation)
    found = slopes(lanes, size, theta, probe_keys(key, num_directions))
    dim = sum(x.size for x in jax.tree.leaves(theta))
    return windows_from(jax.device_get(found), num_directions, dim)


def probe_keys(key: Key, num_directions: int) -> tuple[Key, Key]:
    """The keys of the episodes, and of their directions, for two episodes in each direction."""
    of_episodes, of_directions = jax.random.split(key)
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    number = jnp.arange(EPISODES * num_directions)
    return fold(of_episodes, number), fold(of_directions, number // EPISODES)


def window_lanes(number: int, most_stretches: int = 12) -> _probes.Schedule:
    """The lanes from which ``windows_from`` makes ``Windows``, for so many windows.

    First one for every stretch, perturbed from its start on; then fresh perturbations of a state
    that restarts in every window; then fresh noise in every window and a state that persists.
    """
    length = stretch_length(number, most_stretches)
    stretch = np.arange(number) // length
    after = stretch[None] >= np.arange(stretch[-1] + 1)[:, None]
    scale = np.concatenate([after, np.ones((2, number))]).astype(np.float32)
    draw, restart = np.zeros(scale.shape), np.zeros(scale.shape, bool)
    restart[-2] = True
    draw[-1] = 1 + np.arange(number)
    return _probes.schedule(scale, draw=draw, restart=restart)


def windows_from(
    slopes: _probes.Slopes, num_directions: int, dim: int, most_stretches: int = 12
) -> Windows:
    """Makes ``Windows`` from the slopes of ``window_lanes``; more lanes behind them are ignored."""
    number = slopes.losses.shape[-1]
    length = stretch_length(number, most_stretches)
    starts = np.arange(0, number, length)
    shape = (num_directions, EPISODES, -1, number)
    persistent = slopes.persistent().reshape(shape) / number
    after = np.add.reduceat(persistent[:, :, : len(starts)], starts, axis=-1)  # [d, e, i, k]
    alone = after - np.concatenate([after[:, :, 1:], np.zeros_like(after[:, :, :1])], axis=2)
    own = slopes.own().reshape(shape)[:, :, len(starts)] / number
    fresh = persistent[:, :, len(starts) + 1] if length > 1 else None
    return Windows(np.swapaxes(alone, 2, 3), own, fresh, length, dim)


def stretch_length(number: int, most_stretches: int) -> int:
    """The windows in a stretch: the fewest with which there are at most so many stretches.

    A divisor of their number is preferred, if it is at most twice as large.
    """
    least = -(-number // most_stretches)
    fitting = [d for d in range(least, 2 * least + 1) if number % d == 0]
    return fitting[0] if fitting else least
