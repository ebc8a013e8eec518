"""Schedules: how much of the data and how much noise a latent has at each time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad.types import Numeric

__all__ = ["Schedule", "tabulated", "vp"]

Schedule = Callable[[Numeric], tuple[Numeric, Numeric]]
"""``schedule(t) -> (alpha, sigma)``: at time t in [0, 1] a latent is alpha data + sigma noise."""


def vp(beta_min: float | jax.Array = 0.1, beta_max: float | jax.Array = 20.0) -> Schedule:
    """The variance-preserving schedule, whose noise rate rises linearly from beta_min to beta_max.

    log alpha(t) = -t^2 (beta_max - beta_min)/4 - t beta_min/2 and sigma^2 = 1 - alpha^2: the data
    alone at t = 0, and almost pure noise at t = 1 (alpha = 0.0066 with the defaults).

    Args:
        beta_min: The noise rate at t = 0, per unit of time.
        beta_max: The noise rate at t = 1.

    Raises:
        ValueError: If not 0 <= beta_min <= beta_max, or beta_max is 0. Traced rates, by which one
            differentiates, are not checked.

    Example:
        >>> from unrollgrad import samplers
        >>> alpha, sigma = samplers.vp()(0.5)
        >>> round(float(alpha), 4), round(float(sigma), 4)
        (0.2812, 0.9597)

    References:
        Song et al., Score-based generative modeling through SDEs, ICLR 2021, arXiv:2011.13456.
    """
    known = not any(isinstance(x, jax.core.Tracer) for x in (beta_min, beta_max))
    if known and (not 0 <= beta_min <= beta_max or beta_max == 0):
        raise ValueError(
            "`beta_min` and `beta_max` must satisfy 0 <= beta_min <= beta_max with beta_max > 0; "
            f"got beta_min={beta_min} and beta_max={beta_max}."
        )

    def schedule(t):
        log_alpha = -0.25 * t**2 * (beta_max - beta_min) - 0.5 * t * beta_min
        return jnp.exp(log_alpha), root(-jnp.expm1(2 * log_alpha))

    return schedule


def tabulated(alphas_cumprod: Any) -> Schedule:
    """The schedule of a model that was trained with discrete noise levels, such as 1000 of them.

    Entry i of the table is alpha^2 at t = (i + 1)/length; alpha is 1 at t = 0, and alpha^2 is
    linear in between. With a ``num_steps`` that divides the length only entries of the table are
    used: step k ends at entry k length/num_steps - 1.

    Args:
        alphas_cumprod: The table, decreasing, between 0 and 1: ``alphas_cumprod`` of diffusers.

    Raises:
        ValueError: If the table does not decrease from at most 1 to above 0.

    Example:
        >>> import numpy as np
        >>> from unrollgrad import samplers
        >>> betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        >>> alpha, sigma = samplers.tabulated(np.cumprod(1 - betas))(1.0)
        >>> round(float(alpha), 4)
        0.0683
    """
    table = np.asarray(alphas_cumprod, np.float64)
    falls = table.ndim == 1 and table.size > 0 and np.all(np.diff(table) < 0)
    if not falls or not (0 < table[-1] and table[0] <= 1):
        raise ValueError(
            "`alphas_cumprod` must be a list of numbers that decrease from at most 1 to above 0; "
            f"got shape {table.shape} with values from {table.min(initial=np.inf)} to "
            f"{table.max(initial=-np.inf)}. A last value of 0 has to be left out: an estimate of "
            "the data divides by alpha."
        )
    values = np.concatenate([[1.0], table])

    def schedule(t):
        place = jnp.asarray(t, jnp.result_type(float)) * table.size
        square = jnp.interp(place, np.arange(values.size), values)
        return jnp.sqrt(square), root(1 - square)

    return schedule


def root(x: Numeric) -> jax.Array:
    """The square root of a variance that is 0 at an end, or below 0 by rounding.

    There it is 0 with derivative 0, where sqrt would have an infinite derivative or NaN. So the
    derivative by a parameter is right wherever the variance is positive, and where the parameter
    leaves it at 0. A NaN stays one.
    """
    none = jnp.asarray(x) <= 0
    return jnp.where(none, 0, jnp.sqrt(jnp.where(none, 1, x)))


def at(schedule: Schedule, t: Numeric, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Alpha and sigma at a time, in a dtype."""
    alpha, sigma = schedule(t)
    return jnp.asarray(alpha, dtype), jnp.asarray(sigma, dtype)
