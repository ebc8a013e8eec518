"""Matrix products with leaves that may have low-rank noise."""

from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad._core.optional_packages import need
from unrollgrad.noise._arrays import is_low_rank


def matmul(x: Any, w: Any) -> jax.Array:
    """Computes ``x @ w``, where w is an array or what a law's ``perturb`` made of one.

    Inside ``init``, ``step`` and ``evaluate`` of a problem every ``x @ w`` does this by itself.
    Elsewhere, in a model that you run on ``law.perturb(theta, factors, scale)``, a leaf with
    low-rank noise is not an array, and this function multiplies by it: x w + scale (x a) b'.

    Example:
        >>> import jax.numpy as jnp, unrollgrad as ug
        >>> ug.noise.matmul(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
        (2, 4)
    """
    if is_low_rank(x) or is_low_rank(w):
        return need("quax", "quax", "lowrank").quaxify(jnp.matmul)(x, w)
    return jnp.matmul(x, w)
