"""Learned schedules: SGD and Adam whose hyperparameters are theta."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unrollgrad._core.dtypes import wide
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
        ValueError: If the knots do not increase, the rate is not positive, or a decay is not
            between 0 and 1.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> sgd = ug.learned_optimizers.scheduled_sgd(rate=0.5)
        >>> optimizer = sgd.transform(sgd.init(jax.random.key(0)))
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
            "momentum_logit": _logit("momentum", momentum),
        }

    def transform(theta):
        momentum = jax.nn.sigmoid(theta["momentum_logit"])
        rate = _schedule(theta["log_rate"], knots)
        return _widened(optax.sgd(rate, momentum=momentum))

    return Architecture(init, transform)


def scheduled_adam(
    *, knots: Sequence[int] = KNOTS, rate: float = 0.01, b1: float = 0.9, b2: float = 0.999
) -> Architecture:
    """Adam; theta is the schedule of its rate, and both decays.

    Its moments are float32 at least, and 1e-12 is added to the second one below the root: gradients
    under 1e-6 take shorter steps than optax.adam's, and derivatives are finite where one is zero.

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
        ValueError: If the knots do not increase, the rate is not positive, or a decay is not
            between 0 and 1.

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
            "b1_logit": _logit("b1", b1),
            "b2_logit": _logit("b2", b2),
        }

    def transform(theta):
        adam = optax.adam(
            _schedule(theta["log_rate"], knots),
            b1=jax.nn.sigmoid(theta["b1_logit"]),
            b2=jax.nn.sigmoid(theta["b2_logit"]),
            eps_root=1e-12,  # finite derivatives where a gradient is zero
        )
        return _widened(adam)

    return Architecture(init, transform)


def _schedule(log_rate: jax.Array, knots: Sequence[int]) -> optax.Schedule:
    def rate(count):
        at = jnp.log1p(jnp.asarray(count, log_rate.dtype))
        return jnp.exp(jnp.interp(at, jnp.log1p(jnp.asarray(knots, log_rate.dtype)), log_rate))

    return rate


def _widened(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Moments of float32 at least, updates in the gradients' dtypes."""

    def widened(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.asarray(x, wide(jnp.result_type(x))), tree)

    def like(old: Any, new: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.asarray(b, jnp.result_type(a)), old, new)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        moves, new = transform.update(widened(updates), state, params)
        return like(updates, moves), like(state, new)

    return optax.GradientTransformation(lambda params: transform.init(widened(params)), update)


def _everywhere(rate: float, knots: Sequence[int]) -> Theta:
    if not rate > 0:
        raise ValueError(f"`rate` must be positive; got {rate}.")
    return jnp.full(len(knots), np.log(rate), jnp.float32)


def _logit(name: str, decay: float) -> jax.Array:
    if not 0 < decay < 1:
        raise ValueError(
            f"`{name}` must lie between 0 and 1, since its logit is theta; got {decay}."
        )
    return jnp.asarray(np.log(decay / (1 - decay)), jnp.float32)


def _increasing(knots: Sequence[int]) -> None:
    if len(knots) == 0 or knots[0] < 0 or any(np.diff(knots) <= 0):
        raise ValueError(f"`knots` must be steps >= 0 that increase; got {tuple(knots)}.")
