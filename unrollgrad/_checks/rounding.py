"""Whether a perturbation survives rounding to theta's dtype.

bfloat16 keeps 8 bits: near 1 its neighbours are 1/256 below and 1/128 above, and theta + eps rounds
back to theta where eps is less than half of that. The estimators weigh with what is left, so they
stay true, but a coordinate that never moves has no gradient.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad.types import Theta

_MOST = 100_000  # coordinates of a leaf that are looked at


def check(sigma: Any, theta: Theta) -> None:
    """Raises ValueError where most perturbations of a leaf of theta round to zero.

    Traced values are not known, and not checked.

    Args:
        sigma: A pytree prefix of theta.
        theta: Outer parameters.
    """
    full = arguments.broadcast_sigma(sigma, theta)
    named = jax.tree_util.tree_leaves_with_path(theta)
    worst, at = 1.0, None
    for (path, x), s in zip(named, jax.tree.leaves(full), strict=True):
        if _known(x) and _known(s) and fraction_lost(s, x) > 0.5:
            factor = _factor(s, x)
            if factor > worst:
                worst, at = factor, (jax.tree_util.keystr(path), x, s)
    if at is None:
        return
    path, x, s = at
    where = path if jax.tree_util.tree_structure(sigma).num_nodes > 1 else ""
    if np.ndim(s) == 0:
        least = float(f"{float(s) * worst:.1e}")
        what, more = f"sigma{where}={float(s):g}", f"Raise sigma{where} to at least {least:g}"
    else:
        what, more = f"sigma{where}", f"Raise sigma{where} {worst:.2g}-fold or more"
    wider = "float64" if x.dtype == jnp.float32 else "float32"
    raise ValueError(
        f"{what} is under {x.dtype}'s resolution of theta{path} ({fraction_lost(s, x):.0%} of "
        f"perturbations round to zero). {more}"
        + (f", or hold theta in {wider}." if x.dtype != jnp.float64 else ".")
    )


def fraction_lost(sigma: Any, x: jax.Array) -> float:
    """The expected fraction of Gaussian perturbations of ``x`` that round to zero.

    Args:
        sigma: Their standard deviation; broadcasts to ``x``.
        x: A leaf of theta; of a large one, 10^5 coordinates are drawn.

    Example:
        >>> import jax.numpy as jnp
        >>> round(fraction_lost(0.001, jnp.ones(3, jnp.bfloat16)), 2)
        0.97
    """
    ratios = np.stack(_half_gaps(sigma, x)).ravel()
    values, counts = np.unique(ratios, return_counts=True)  # few: gaps are powers of two
    lost = np.array([math.erf(r / math.sqrt(2)) for r in values])
    return float(np.sum(lost * counts) / ratios.size)


def _half_gaps(sigma: Any, x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Half the distances to the next number away from zero and towards it, over sigma."""
    info, size = jnp.finfo(x.dtype), np.asarray(x)  # in numpy: this may run inside a trace
    spread = np.broadcast_to(np.asarray(sigma, np.float64), size.shape)
    if size.size > _MOST:
        some = np.random.default_rng(0).integers(size.size, size=_MOST)
        where = np.unravel_index(some, size.shape)
        size, spread = size[where], spread[where]
    size = np.abs(size.astype(np.float64))
    mantissa, exponent = np.frexp(size)  # size = mantissa 2^exponent, mantissa in [1/2, 1)
    up = np.ldexp(1.0, exponent - 1 - info.nmant)
    down = np.where(mantissa == 0.5, up / 2, up)
    # Below the least normal number everything is rounded to zero.
    tiny = size < float(info.tiny)
    up, down = (np.where(tiny, 2 * float(info.tiny), gap) for gap in (up, down))
    return up / 2 / spread, down / 2 / spread


def _factor(sigma: Any, x: jax.Array) -> float:
    """By how much sigma must grow for half of the perturbations to survive, rounded up."""
    low, high = 1.0, 2.0
    while fraction_lost(high * np.asarray(sigma, np.float64), x) > 0.5:
        low, high = high, 2 * high
    for _ in range(7):
        middle = math.sqrt(low * high)
        lost = fraction_lost(middle * np.asarray(sigma, np.float64), x)
        low, high = (middle, high) if lost > 0.5 else (low, middle)
    return 1.05 * high  # two digits of it are printed


def _known(x: Any) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
