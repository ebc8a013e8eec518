"""The dtypes in which numbers are perturbed, accumulated and averaged."""

import contextlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad.types import ArrayDType


def wide(*of: object) -> np.dtype:
    """The common dtype of arrays or dtypes, at least float32.

    It is the same under ``jax_numpy_dtype_promotion="strict"``, where JAX itself has no common
    dtype of bfloat16 and float32.
    """
    with standard_promotion():
        return jnp.result_type(jnp.float32, *of)


def rounded(x: jax.Array, dtype: ArrayDType) -> jax.Array:
    """Rounds to the precision of ``dtype``; XLA may drop a cast there and back, but not this."""
    info = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)


@contextlib.contextmanager
def standard_promotion() -> Iterator[None]:
    """JAX's default promotion of dtypes and ranks, for code that does not run under stricter rules.

    optax's optimizers are such code: ``optax.adam`` adds int32 to float32.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
