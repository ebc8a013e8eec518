"""The dtypes in which numbers are perturbed, accumulated and averaged."""

from typing import Any

import jax.numpy as jnp


def wide(dtype: Any) -> Any:
    """The dtype in which a leaf is perturbed and accumulated: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)
