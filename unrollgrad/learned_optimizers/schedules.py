"""Learned schedules: SGD and Adam whose hyperparameters are theta."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unrollgrad._checks import arguments
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad.learned_optimizers.architecture import Architecture

__all__ = ["KNOTS", "scheduled_adam", "scheduled_sgd"]

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
        rate: Initial learning rate for meta-training, the same at all knots.
        momentum: Initial momentum for meta-training.

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
    return _scheduled(optax.sgd, knots, rate, {"momentum": momentum})


def scheduled_adam(
    *, knots: Sequence[int] = KNOTS, rate: float = 0.01, b1: float = 0.9, b2: float = 0.999
) -> Architecture:
    """Adam; theta is the schedule of its rate, and both decays.

    theta = {"log_rate": (len(knots),), "b1_logit": (), "b2_logit": ()}. Knots, rate, result and
    errors are as for ``scheduled_sgd``; ``b1`` and ``b2`` are the initial decays.

    Its moments are at least float32, and 1e-12 is added to the second moment below the root:
    gradients under 1e-6 take shorter steps than with optax.adam, and derivatives are finite where a
    gradient is zero.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> adam = ug.learned_optimizers.scheduled_adam(rate=0.5)
        >>> optimizer = adam.transform(adam.init(jax.random.key(0)))
        >>> params = jnp.ones(2)
        >>> updates, state = optimizer.update(params, optimizer.init(params), params)
        >>> [round(float(u), 3) for u in updates]
        [-0.5, -0.5]
    """
    adam = functools.partial(optax.adam, eps_root=1e-12)
    return _scheduled(adam, knots, rate, {"b1": b1, "b2": b2})


def _scheduled(
    optimizer: Callable[..., optax.GradientTransformation],
    knots: Sequence[int],
    rate: float,
    decays: dict[str, float],
) -> Architecture:
    """``optimizer(schedule, **decays)``, whose theta is the log rates and the decays' logits."""
    if len(knots) == 0 or knots[0] < 0 or any(np.diff(knots) <= 0):
        raise ValueError(f"`knots` must be steps >= 0 that increase; got {tuple(knots)}.")

    def init(key):
        if not rate > 0:
            raise ValueError(f"`rate` must be positive; got {rate}.")
        logits = {f"{name}_logit": _logit(name, decay) for name, decay in decays.items()}
        return {"log_rate": jnp.full(len(knots), np.log(rate), jnp.float32), **logits}

    def transform(theta):
        learned = {name: jax.nn.sigmoid(theta[f"{name}_logit"]) for name in decays}
        return _widened(optimizer(_schedule(theta["log_rate"], knots), **learned))

    return Architecture(init, transform)


def _schedule(log_rate: jax.Array, knots: Sequence[int]) -> optax.Schedule:
    def rate(count):
        at = jnp.log1p(jnp.asarray(count, log_rate.dtype))
        return jnp.exp(jnp.interp(at, jnp.log1p(jnp.asarray(knots, log_rate.dtype)), log_rate))

    return rate


def _widened(transform: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transformation with moments of at least float32 and updates in the gradients' dtypes."""

    def widened(tree):
        def leaf(x):
            dtype = wide(arguments.dtype_of(x))
            if isinstance(x, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(x.shape, dtype)
            return jnp.asarray(x, dtype)

        return jax.tree.map(leaf, tree)

    def like(old, new):
        return jax.tree.map(lambda a, b: jnp.asarray(b, jnp.result_type(a)), old, new)

    @standard_promotion()
    def update(updates, state, params=None, **extra_args):
        moves, new = transform.update(widened(updates), state, params)
        return like(updates, moves), like(state, new)

    def init(params):
        return transform.init(widened(params))

    return optax.GradientTransformationExtraArgs(init, update)


def _logit(name: str, decay: float) -> jax.Array:
    if not 0 < decay < 1:
        raise ValueError(
            f"`{name}` must lie between 0 and 1, since its logit is theta; got {decay}."
        )
    return jnp.asarray(np.log(decay / (1 - decay)), jnp.float32)
