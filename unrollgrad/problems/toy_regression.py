"""A two-dimensional toy whose outer loss surface is chaotic at large learning rates."""

import jax
import jax.numpy as jnp

from unrollgrad.problems.types import Example
from unrollgrad.types import UnrolledProblem

__all__ = ["toy_regression"]


def toy_regression(horizon: int = 100) -> Example:
    """Gradient descent on a wiggly function of two variables; theta is the learning-rate schedule.

    f(x) = sqrt(x0^2 + 5) - sqrt(5) + sin(x1)^2 exp(-5 x0^2) + |x1 - 100| / 4, from x = (1, 1), with
    rate exp(theta0) (T - t)/T + exp(theta1) t/T at step t; the step loss is f after the step.

    Known, for 100 J at the default horizon: 2488 at the default theta = (-4, -4), a grid minimum of
    about 552 near (2.80, -4.1), smoothed minima 568, 610, 1056 for sigma = 0.1, 0.3, 1. Methods
    that see one window stay on the plateau; backpropagated gradients are dominated by the wiggles.

    Args:
        horizon: Inner steps in an episode.

    Example:
        >>> import jax, unrollgrad as ug
        >>> problem, theta = ug.problems.toy_regression()
        >>> round(100 * float(ug.episode_loss(problem, jax.random.key(0), theta)))
        2488

    References:
        Vicol et al., ICML 2021, arXiv:2112.13835.
    """

    def function(x):
        wiggle = jnp.sin(x[1]) ** 2 * jnp.exp(-5 * x[0] ** 2)
        bowl = jnp.sqrt(x[0] ** 2 + 5) - jnp.sqrt(jnp.asarray(5, x.dtype))
        return bowl + wiggle + 0.25 * jnp.abs(x[1] - 100)

    def init(key, theta):
        return jnp.ones(2, theta.dtype)

    def step(key, theta, state, t):
        fraction = t / jnp.asarray(horizon, theta.dtype)
        rate = jnp.exp(theta[0]) * (1 - fraction) + jnp.exp(theta[1]) * fraction
        state = state - rate * jax.grad(function)(state)
        return state, function(state)

    return Example(UnrolledProblem(init, step, horizon), jnp.full(2, -4.0, jnp.float32))
