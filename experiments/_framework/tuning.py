"""Choosing an outer learning rate by trying each of a grid with the same effort."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from experiments._framework import training
from unrollgrad.types import GradientEstimator, Key, Theta


def best_rate(
    estimator: GradientEstimator,
    optimizer: Callable[[jax.Array], optax.GradientTransformation],
    rates: Sequence[float],
    keys: Key,
    theta: Theta,
    num_steps: int,
    every: int,
    loss: Callable[[Theta], jax.Array],
) -> float:
    """The rate with the lowest geometric mean of the loss along its runs: both quick and good.

    Args:
        estimator: Of the gradient.
        optimizer: From a rate to the outer optimizer.
        rates: The grid. One whose loss is not finite somewhere is the worst.
        keys: One run of each rate for each key, so not those of runs that are reported.
        theta: Where all begin.
        num_steps: Of each run, a multiple of ``every``.
        every: Updates between the points where the loss is looked at.
        loss: Of theta, positive.
    """
    if len(rates) == 1:
        return rates[0]
    curves = _curves(estimator, optimizer, jnp.asarray(rates), keys, theta, num_steps, every, loss)
    scores = jnp.mean(jnp.log(curves), axis=(1, 2))
    return rates[int(jnp.argmin(jnp.where(jnp.isfinite(scores), scores, jnp.inf)))]


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6, 7))
def _curves(estimator, optimizer, rates, keys, theta, num_steps, every, loss) -> jax.Array:
    """The losses after the beginning, by rate, key and point."""

    def run(rate, key):
        thetas, _ = training.trajectory(estimator, optimizer(rate), key, theta, num_steps, every)
        return jax.vmap(loss)(jax.tree.map(lambda x: x[1:], thetas))

    return jax.vmap(lambda rate: jax.vmap(lambda key: run(rate, key))(keys))(rates)
