"""Samples of an estimator, and how they are judged against a closed form."""

import jax
import jax.numpy as jnp
import numpy as np


class Samples:
    """Independent vector samples, their mean and its standard error."""

    def __init__(self, x):
        self.x = np.asarray(x, np.float64).reshape(len(x), -1)
        self.mean = self.x.mean(axis=0)
        self.se = self.x.std(axis=0, ddof=1) / np.sqrt(len(self.x))

    def error_in_se(self, truth):
        """The largest |mean - truth| in standard errors, over the coordinates."""
        difference = np.abs(self.mean - np.ravel(truth))
        return float(np.max(difference / np.maximum(self.se, 1e-300)))

    def relative_error(self, truth):
        return float(np.linalg.norm(self.mean - np.ravel(truth)) / np.linalg.norm(truth))

    def relative_se(self, truth):
        return float(np.linalg.norm(self.se) / np.linalg.norm(truth))

    def variance(self):
        """The trace of the covariance of one sample and the standard error of that."""
        squares = np.sum((self.x - self.mean) ** 2, axis=1) * len(self.x) / (len(self.x) - 1)
        return squares.mean(), squares.std(ddof=1) / np.sqrt(len(squares))

    def mean_square(self):
        """E|x|^2 and its standard error."""
        squares = np.sum(self.x**2, axis=1)
        return squares.mean(), squares.std(ddof=1) / np.sqrt(len(squares))


def window_gradients(estimator, key, theta, num_windows, num_episodes):
    """The gradients of ``num_episodes`` fresh workers, shape (episodes, windows, P)."""

    def episode(key):
        def call(state, i):
            estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
            return state, jnp.concatenate([g.ravel() for g in jax.tree.leaves(estimate.grad)])

        return jax.lax.scan(call, estimator.init(key, theta), jnp.arange(num_windows))[1]

    draw = jax.jit(lambda keys: jax.lax.map(episode, keys, batch_size=4000))
    return np.asarray(draw(jax.random.split(key, num_episodes)))
