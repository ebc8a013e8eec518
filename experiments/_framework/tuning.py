"""Choosing an outer learning rate by trying each of a grid with the same effort."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments._framework import training
from unrollgrad.types import GradientEstimator, Key, Theta


class Trial(NamedTuple):
    """The run that is repeated with every learning rate.

    Attributes:
        estimator: The gradient estimator.
        optimizer: From a learning rate to the outer optimizer.
        num_steps: Updates of the run, a multiple of ``every``.
        every: Updates between the points at which the loss is measured.
        loss: The positive loss of a theta.
    """

    estimator: GradientEstimator
    optimizer: Callable[..., optax.GradientTransformation]
    num_steps: int
    every: int
    loss: Callable[..., jax.Array]


def best_rate(trial: Trial, rates: Sequence[float], keys: Key, theta: Theta) -> float:
    """The rate with the lowest geometric mean of the loss along its runs: both quick and good.

    Args:
        trial: The run that is repeated with every rate.
        rates: The grid. A rate whose loss is not finite somewhere counts as the worst.
        keys: Each rate has one run for each key; runs that are reported need other keys.
        theta: Initial outer parameters.
    """
    if len(rates) == 1:
        return rates[0]
    scores = jnp.mean(jnp.log(_curves(trial, jnp.asarray(rates), keys, theta)), axis=(1, 2))
    return rates[int(jnp.argmin(jnp.where(jnp.isfinite(scores), scores, jnp.inf)))]


@functools.partial(jax.jit, static_argnums=0)
def _curves(trial: Trial, rates: jax.Array, keys: Key, theta: Theta) -> jax.Array:
    """The losses after the beginning, by rate, key and point."""

    def run(rate, key):
        optimizer = trial.optimizer(rate)
        steps = trial.num_steps, trial.every
        thetas, _ = training.trajectory(trial.estimator, optimizer, key, theta, *steps)
        return jax.vmap(trial.loss)(jax.tree.map(lambda x: x[1:], thetas))

    return jax.vmap(lambda rate: jax.vmap(lambda key: run(rate, key))(keys))(rates)
