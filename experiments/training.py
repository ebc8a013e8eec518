"""The outer loop of the experiments: an estimator, an optax optimizer, whole runs in one scan."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from unrollgrad.types import GradientEstimator, Key, Theta


@functools.partial(jax.jit, static_argnums=(0, 1, 4, 5))
def trajectory(
    estimator: GradientEstimator,
    optimizer: optax.GradientTransformation,
    key: Key,
    theta: Theta,
    num_updates: int,
    every: int = 1,
) -> tuple[Theta, jax.Array]:
    """Updates theta ``num_updates`` times.

    Args:
        estimator: Of the gradient.
        optimizer: The outer optimizer.
        key: Update i uses ``fold_in(key, i)``.
        theta: Where to begin.
        num_updates: A multiple of ``every``.
        every: Updates between the thetas that are kept.

    Returns:
        The thetas after every ``every`` updates, stacked, the first being the beginning; and each
        update's loss estimate, shape ``(num_updates,)``.

    Raises:
        ValueError: If num_updates is negative or no multiple of ``every``.
    """
    if num_updates < 0 or num_updates % every:
        raise ValueError(
            f"`num_updates` must be a multiple of every={every}; got num_updates={num_updates}."
        )
    theta = jax.tree.map(jnp.asarray, theta)

    def update(carry, i):
        theta, state, opt_state = carry
        estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
        updates, opt_state = optimizer.update(estimate.grad, opt_state, theta)
        return (optax.apply_updates(theta, updates), state, opt_state), estimate.loss

    def stretch(carry, first):
        carry, losses = jax.lax.scan(update, carry, first + jnp.arange(every))
        return carry, (carry[0], losses)

    begin: Any = (theta, estimator.init(key, theta), optimizer.init(theta))
    _, (thetas, losses) = jax.lax.scan(stretch, begin, jnp.arange(0, num_updates, every))
    kept = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), theta, thetas)
    return kept, losses.ravel()
