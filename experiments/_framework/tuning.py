"""Choosing an outer learning rate by trying each of a grid with the same effort."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

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
    return rates[int(jnp.argmin(scores(trial, rates, keys, theta)))]


def scores(trial: Trial, rates: Sequence[float], keys: Key, theta: Theta) -> jax.Array:
    """For each rate, the logarithm of the geometric mean of the loss along its runs.

    It is infinite if a loss is not finite somewhere; the arguments are ``best_rate``'s.
    """
    found = score(_curves(trial, jnp.asarray(rates), keys, theta))
    return jnp.mean(found, axis=1)


def score(losses: jax.Array) -> jax.Array:
    """The logarithm of the geometric mean of each row of losses, infinite if one is not finite."""
    means = jnp.mean(jnp.log(losses), axis=-1)
    return jnp.where(jnp.isfinite(means), means, jnp.inf)


@functools.partial(jax.jit, static_argnums=0)
def _curves(trial: Trial, rates: jax.Array, keys: Key, theta: Theta) -> jax.Array:
    """The losses after the beginning, by rate, key and point."""

    def run(rate, key):
        optimizer = trial.optimizer(rate)
        steps = trial.num_steps, trial.every
        thetas = trajectory(trial.estimator, optimizer, key, theta, *steps)
        return jax.vmap(trial.loss)(jax.tree.map(lambda x: x[1:], thetas))

    return jax.vmap(lambda rate: jax.vmap(lambda key: run(rate, key))(keys))(rates)


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def trajectory(
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    key: Key,
    theta: Theta,
    num_steps: int,
    every: int = 1,
) -> Theta:
    """Updates theta ``num_steps`` times inside one program, so that vmap runs many at once.

    Args:
        estimator: The gradient estimator.
        optimizer: The outer optimizer.
        key: Update i uses ``fold_in(key, i)``.
        theta: Initial outer parameters.
        num_steps: A multiple of ``every``.
        every: Updates between the thetas that are kept.

    Returns:
        The initial theta and the thetas after every ``every`` updates, stacked.

    Raises:
        ValueError: If num_steps is negative or not a multiple of ``every``.
    """
    if num_steps < 0 or num_steps % every:
        raise ValueError(
            f"`num_steps` must be a multiple of every={every}; got num_steps={num_steps}."
        )

    def update(carry, i):
        theta, state, opt_state = carry
        estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
        updates, opt_state = optimizer.update(estimate.grad, opt_state, theta)
        return (optax.apply_updates(theta, updates), state, opt_state), None

    def stretch(carry, first):
        carry, _ = jax.lax.scan(update, carry, first + jnp.arange(every))
        return carry, carry[0]

    theta = jax.tree.map(jnp.asarray, theta)
    begin = theta, estimator.init(key, theta), optimizer.init(theta)
    _, thetas = jax.lax.scan(stretch, begin, jnp.arange(0, num_steps, every))
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), begin[0], thetas)
