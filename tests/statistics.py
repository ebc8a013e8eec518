"""Samples of an estimator, and their comparison with a closed form."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug


class Samples:
    """Independent vector samples, with their mean and its standard error."""

    def __init__(self, x: Any):
        self.x = np.asarray(x, np.float64).reshape(len(x), -1)
        self.mean = self.x.mean(axis=0)
        self.se = self.x.std(axis=0, ddof=1) / np.sqrt(len(self.x))

    def error_in_se(self, truth: Any) -> float:
        """The largest |mean - truth| in standard errors, over the coordinates."""
        difference = np.abs(self.mean - np.ravel(truth))
        return float(np.max(difference / np.maximum(self.se, 1e-300)))

    def relative_error(self, truth: Any) -> float:
        return float(np.linalg.norm(self.mean - np.ravel(truth)) / np.linalg.norm(truth))

    def relative_se(self, truth: Any) -> float:
        return float(np.linalg.norm(self.se) / np.linalg.norm(truth))

    def variance(self) -> tuple[float, float]:
        """The trace of the covariance of one sample, and its standard error."""
        squares = np.sum((self.x - self.mean) ** 2, axis=1) * len(self.x) / (len(self.x) - 1)
        return _mean(squares)


def mean_square(windows: np.ndarray) -> tuple[float, float]:
    """E|x|^2 for a window at a random place, and its standard error.

    Args:
        windows: Shape (episodes, windows, P). The windows of one episode are correlated: their mean
            is one sample.
    """
    return _mean(np.sum(windows.astype(np.float64) ** 2, axis=2).mean(axis=1))


def _mean(x: np.ndarray) -> tuple[float, float]:
    return float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x)))


def sampler(make: Callable[[Any], ug.GradientEstimator], num_windows: int) -> Callable:
    """A compiled ``draw(key, num_episodes, theta, data=None)``.

    It returns the gradients of fresh workers, shape (episodes, windows, P). ``make(data)`` makes
    the estimator inside the program, so that ``data`` is an argument of the program and other
    numbers in it compile nothing.
    """

    @functools.partial(jax.jit, static_argnums=1)
    def draw(key, num_episodes, theta, data):
        estimator = make(data)

        def episode(key):
            def call(state, i):
                estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
                return state, jnp.concatenate([g.ravel() for g in jax.tree.leaves(estimate.grad)])

            return jax.lax.scan(call, estimator.init(key, theta), jnp.arange(num_windows))[1]

        keys = jax.random.split(key, num_episodes)
        return jax.lax.map(episode, keys, batch_size=min(4000, num_episodes))

    def fetched(key, num_episodes, theta, data=None):
        return np.asarray(draw(key, num_episodes, theta, data))

    return fetched


def window_gradients(
    estimator: ug.GradientEstimator,
    key: jax.Array,
    theta: Any,
    num_windows: int,
    num_episodes: int,
) -> np.ndarray:
    """The gradients of ``num_episodes`` fresh workers, shape (episodes, windows, P)."""
    return sampler(lambda _: estimator, num_windows)(key, num_episodes, theta)
