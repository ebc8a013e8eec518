"""Eight Gaussians on a circle: exact velocity, tilted laws in closed form, distance to them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad.types import Key

RADIUS, STD = 4.0, 0.3
ANGLES = np.arange(8) * np.pi / 4
MEANS = RADIUS * np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=-1)
TARGET = MEANS[0]
"""The point that the reward asks for: the mean of one of the Gaussians."""


class Law(NamedTuple):
    """A mixture of eight Gaussians of one variance.

    Attributes:
        weights: Shape (8,), their sum is 1.
        means: Shape (8, 2).
        variance: The variance of each coordinate.
    """

    weights: np.ndarray
    means: np.ndarray
    variance: float


def reward(x: jax.Array) -> jax.Array:
    """Minus half the squared distance to the target."""
    return -0.5 * jnp.sum((x - TARGET) ** 2)


def tilted(scale: float) -> Law:
    """The law p(x) exp(scale reward(x)) of the data's law p; scale 0 is p itself.

    A Gaussian times exp(-scale |x - c|^2/2) is a Gaussian of precision 1/STD^2 + scale; its weight
    is multiplied by its integral.
    """
    variance = 1 / (1 / STD**2 + scale)
    means = variance * (MEANS / STD**2 + scale * TARGET)
    exponents = -0.5 * scale * np.sum((MEANS - TARGET) ** 2, -1) / (1 + scale * STD**2)
    weights = np.exp(exponents)
    return Law(weights / weights.sum(), means, variance)


def mean_reward(law: Law) -> float:
    """The mean of the reward under a law."""
    distances = np.sum((law.means - TARGET) ** 2, -1) + 2 * law.variance
    return float(-0.5 * law.weights @ distances)


def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
    """E[data - noise | t data + (1 - t) noise = x], exactly."""
    variance = (t * STD) ** 2 + (1 - t) ** 2
    gaps = x - t * MEANS
    weights = jax.nn.softmax(-jnp.sum(gaps**2, -1) / (2 * variance))
    return weights @ (MEANS + (t * STD**2 - (1 - t)) / variance * gaps)


def draw(law: Law, key: Key, number: int) -> jax.Array:
    """Samples of a law, shape (number, 2)."""
    which, noise = jax.random.split(key)
    places = jax.random.choice(which, 8, (number,), p=jnp.asarray(law.weights))
    normal = jax.random.normal(noise, (number, 2))
    return jnp.asarray(law.means)[places] + law.variance**0.5 * normal


def shares(x: jax.Array) -> jax.Array:
    """The share of the samples whose nearest Gaussian is each of the eight."""
    distances = jnp.sum((x[:, None] - MEANS) ** 2, -1)
    return jnp.mean(jax.nn.one_hot(jnp.argmin(distances, -1), 8), 0)


def mode_divergence(x: jax.Array, law: Law) -> jax.Array:
    """The Kullback-Leibler divergence of the samples' shares of the modes from the law's weights.

    With n samples it is 7/(2 n) too large on average.
    """
    found = shares(x)
    return jnp.sum(jax.scipy.special.xlogy(found, found / law.weights))


def divergence(x: jax.Array, law: Law) -> jax.Array:
    """An estimate of KL(law of the samples | law): minus entropy, minus the mean log density.

    The entropy is estimated from the distances to the nearest neighbours (Kozachenko and
    Leonenko), which has a small bias where the density is smooth.
    """
    n = len(x)
    squares = jnp.sum((x[:, None] - x) ** 2, -1) + jnp.where(jnp.eye(n, dtype=bool), jnp.inf, 0)
    nearest = 0.5 * jnp.log(jnp.min(squares, 1))
    entropy = 2 * jnp.mean(nearest) + jnp.log(jnp.pi * (n - 1)) + jnp.euler_gamma
    return -entropy - jnp.mean(log_density(x, law))


def log_density(x: jax.Array, law: Law) -> jax.Array:
    """The logarithm of a law's density at each of the points x."""
    exponents = -jnp.sum((x[:, None] - law.means) ** 2, -1) / (2 * law.variance)
    normalised = exponents - jnp.log(2 * jnp.pi * law.variance)
    return jax.nn.logsumexp(normalised + jnp.log(law.weights), axis=-1)


def frontier(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least divergence from the data's law for each mean reward: (divergences, rewards).

    Tilted laws are the ones that reach it: KL(p_s | p) = s E_s[reward] - log E_p[exp(s reward)].
    """
    divergences, rewards = [], []
    for scale in scales:
        law = tilted(scale)
        far = np.sum((MEANS - TARGET) ** 2, -1)
        shrunk = 1 + scale * STD**2
        log_mean = np.log(np.mean(np.exp(-0.5 * scale * far / shrunk)) / shrunk)
        rewards.append(mean_reward(law))
        divergences.append(scale * rewards[-1] - log_mean)
    return np.array(divergences), np.array(rewards)
