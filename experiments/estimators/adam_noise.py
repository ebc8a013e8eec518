"""How far an estimator's noise keeps Adam from a minimum, predicted from a frozen theta.

Near a minimum of J, where the estimates are mostly noise, Adam with rate a divides them by their
root mean square r: theta drifts by -a J'/r an update, and walks at random with the variance
(a/r)^2 S an update. S is the variance of the mean of U updates, times U, for many updates: n V for
n windows in an episode and the variance V of its mean, because the errors of windows of one episode
depend on each other. So theta's variance is a S / (2 r J''), and J is above its minimum by

    a S / (4 r) = a n V / (4 r)

for each coordinate, whatever J'' is. V of ``es_single`` does not depend on n. That of ``pes`` grows
up to like n, and r like its square root: the excess of ``pes`` grows like n^1.5, with windows of
one step the most. It holds while an update is small beside the basin. Where J has a cliff near its
minimum, a walk of this size goes over the edge.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad.types import GradientEstimator, Key


class Noise(NamedTuple):
    """The noise of an estimator at a frozen theta, for each coordinate.

    Attributes:
        variance: The variance of the mean over an episode's windows.
        square: The mean square of a window's estimate.
        windows: The number of windows in an episode.
    """

    variance: np.ndarray
    square: np.ndarray
    windows: int


def noise(
    estimator: GradientEstimator, windows: int, num_workers: int, key: Key, theta: jax.Array
) -> Noise:
    """Measures the noise on independent workers, each through one episode.

    Args:
        estimator: The estimator; its episodes have ``windows`` windows.
        windows: The number of windows in an episode.
        num_workers: The number of workers.
        key: The key of all episodes.
        theta: Outer parameters, one array.
    """

    @jax.jit
    @jax.vmap
    def episode(key):
        def window(worker, k):
            estimate, worker = estimator.estimate(jax.random.fold_in(key, k), theta, worker)
            return worker, (estimate.grad, estimate.grad**2)

        _, found = jax.lax.scan(window, estimator.init(key, theta), jnp.arange(windows))
        return jax.tree.map(lambda x: x.mean(axis=0), found)

    means, squares = map(np.asarray, episode(jax.random.split(key, num_workers)))
    return Noise(means.var(axis=0, ddof=1), squares.mean(axis=0), windows)


def excess(found: Noise, rate: float) -> float:
    """How far J stays above its minimum with Adam's rate: the sum over the coordinates."""
    return float(np.sum(rate * found.windows * found.variance / (4 * np.sqrt(found.square))))
