"""Learned schedules: SGD and Adam whose hyperparameters are theta."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unrollgrad.learned_optimizers.architecture import Architecture
from unrollgrad.types import Theta

KNOTS = (0, 3, 10, 30, 100, 300, 1000, 3000)
"""Steps at which the log rate is learned."""


def scheduled_sgd(
    *, knots: Sequence[int] = KNOTS, rate: float = 0.1, momentum: float = 0.9
) -> Architecture:
    """SGD with momentum; theta is the schedule of its rate, and the momentum.

    theta = {"log_rate": (len(knots),), "momentum_logit": ()}. The log rate is piecewise linear in
    log(1 + t) between the knots, and constant after the last one.

    Args:
        knots: Steps, increasing.
        rate: At the beginning of meta-training, everywhere.
        momentum: At the beginning of meta-training.

    Returns:
        An ``Architecture``.

    Raises:
        ValueError: If the knots do not increase.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> sgd = ug.learned_optimizers.scheduled_sgd(rate=0.5, momentum=0.0)
        >>> optimizer = sgd.transform(sgd.init(jax.random.key(0)))
        >>> params = jnp.ones(2)
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> [round(float(u), 3) for u in updates]
        [-0.5, -0.5]
    """
    _increasing(knots)

    def init(key):
        del key  # the same for all
        return {"log_rate": _everywhere(rate, knots), "momentum_logit": _logit(momentum)}

    def transform(theta):
        momentum = jax.nn.sigmoid(theta["momentum_logit"])
        rate = _schedule(theta["log_rate"], knots)
        return _keeping_dtypes(optax.sgd(rate, momentum=momentum))

    return Architecture(init, transform)


def scheduled_adam(
    *, knots: Sequence[int] = KNOTS, rate: float = 0.01, b1: float = 0.9, b2: float = 0.999
) -> Architecture:
    """Adam; theta is the schedule of its rate, and both decays.

    theta = {"log_rate": (len(knots),), "b1_logit": (), "b2_logit": ()}. The log rate is piecewise
    linear in log(1 + t) between the knots, and constant after the last one.

    Args:
        knots: Steps, increasing.
        rate: At the beginning of meta-training, everywhere.
        b1: At the beginning of meta-training.
        b2: At the beginning of meta-training.

    Returns:
        An ``Architecture``.

    Raises:
        ValueError: If the knots do not increase.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> adam = ug.learned_optimizers.scheduled_adam(rate=0.5)
        >>> optimizer = adam.transform(adam.init(jax.random.key(0)))
        >>> params = jnp.ones(2)
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> [round(float(u), 3) for u in updates]
        [-0.5, -0.5]
    """
    _increasing(knots)

    def init(key):
        del key  # the same for all
        return {
            "log_rate": _everywhere(rate, knots),
            "b1_logit": _logit(b1),
            "b2_logit": _logit(b2),
        }

    def transform(theta):
        adam = optax.adam(
            _schedule(theta["log_rate"], knots),
            b1=jax.nn.sigmoid(theta["b1_logit"]),
            b2=jax.nn.sigmoid(theta["b2_logit"]),
            eps_root=1e-12,  # finite derivatives where a gradient is zero
        )
        return _keeping_dtypes(adam)

    return Architecture(init, transform)


def _schedule(log_rate: jax.Array, knots: Sequence[int]) -> optax.Schedule:
    def rate(count):
        at = jnp.log1p(jnp.asarray(count, log_rate.dtype))
        return jnp.exp(jnp.interp(at, jnp.log1p(jnp.asarray(knots, log_rate.dtype)), log_rate))

    return rate


def _keeping_dtypes(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """With the dtypes that it is given: theta is float32, and would widen bfloat16 weights."""

    def like(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.asarray(b, a.dtype), old, new)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moves, new = transform.update(updates, state, params)
        return like(updates, moves), like(state, new)

    return optax.GradientTransformation(transform.init, update)


def _everywhere(rate: float, knots: Sequence[int]) -> Theta:
    return jnp.full(len(knots), np.log(rate), jnp.float32)


def _logit(x: float) -> jax.Array:
    return jnp.asarray(np.log(x / (1 - x)) if x > 0 else -np.inf, jnp.float32)


def _increasing(knots: Sequence[int]) -> None:
    if len(knots) == 0 or knots[0] < 0 or any(np.diff(knots) <= 0):
        raise ValueError(f"`knots` must be steps >= 0 that increase; got {tuple(knots)}.")
