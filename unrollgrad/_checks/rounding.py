"""Checks that perturbations survive rounding to theta's dtype.

bfloat16 keeps 8 bits: the numbers next to 1 are 1 - 1/256 and 1 + 1/128, and theta + eps rounds
back to theta if eps is less than half of such a gap. The estimators weigh with the perturbation
after rounding and stay unbiased, but a coordinate that never moves has no gradient.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from unrollgrad._checks import arguments
from unrollgrad.types import Sigma, Theta

_MOST = 100_000  # the largest number of coordinates of a leaf that are examined


def check(sigma: Sigma, theta: Theta) -> None:
    """Raises ValueError if most perturbations of a leaf of theta round to zero.

    Traced values are not known, and not checked.
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


def fraction_lost(sigma: ArrayLike, x: jax.Array) -> float:
    """Computes the expected fraction of Gaussian perturbations of ``x`` that round to zero.

    Args:
        sigma: The perturbations' standard deviation; broadcasts to ``x``.
        x: A leaf of theta; from a large leaf, 10^5 coordinates are drawn, and from
            one that is spread over devices those of a single one.

    Example:
        >>> import jax.numpy as jnp
        >>> round(fraction_lost(0.001, jnp.ones(3, jnp.bfloat16)), 2)
        0.97
    """
    ratios = np.stack(_half_gaps(sigma, x)).ravel()
    values, counts = np.unique(ratios, return_counts=True)  # few: gaps are powers of two
    lost = np.array([math.erf(r / math.sqrt(2)) for r in values])
    return float(np.sum(lost * counts) / ratios.size)


def _half_gaps(sigma: ArrayLike, x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns half the gaps to the next number away from zero and towards zero, over sigma."""
    info, spread = jnp.finfo(x.dtype), np.broadcast_to(np.asarray(sigma, np.float64), x.shape)
    if x.size > _MOST and isinstance(x, jax.Array) and not x.is_fully_replicated:
        part = x.addressable_shards[0]  # a leaf that is spread over devices is not gathered
        x, spread = part.data, spread[part.index]
    size = np.asarray(x)  # in numpy: this may run inside a trace
    if size.size > _MOST:
        some = np.random.default_rng(0).integers(size.size, size=_MOST)
        where = np.unravel_index(some, size.shape)
        size, spread = size[where], spread[where]
    size = np.abs(size.astype(np.float64))
    mantissa, exponent = np.frexp(size)  # size = mantissa 2^exponent, mantissa in [1/2, 1)
    up = np.ldexp(1.0, exponent - 1 - info.nmant)
    down = np.where(mantissa == 0.5, up / 2, up)
    # Numbers below the least normal number are rounded to zero.
    tiny = size < float(info.tiny)
    up, down = (np.where(tiny, 2 * float(info.tiny), gap) for gap in (up, down))
    return up / 2 / spread, down / 2 / spread


def _factor(sigma: ArrayLike, x: jax.Array) -> float:
    """Returns the factor on sigma with which half of the perturbations survive, rounded up."""
    low, high = 1.0, 2.0
    while fraction_lost(high * np.asarray(sigma, np.float64), x) > 0.5:
        low, high = high, 2 * high
    for _ in range(7):
        middle = math.sqrt(low * high)
        lost = fraction_lost(middle * np.asarray(sigma, np.float64), x)
        low, high = (middle, high) if lost > 0.5 else (low, middle)
    return 1.05 * high  # two digits are printed


def _known(x: object) -> bool:
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
