"""The array type of a leaf with low-rank noise: w + scale a b', which is never added up.

``a``, ``b`` and ``scale`` have the axes of ``w``, each as long as there or of length 1, and the
factors a last axis more, the rank. The leaf stands for w + scale times the sum over the last axis
of a times b, all broadcast: rows are axes of ``a`` alone, columns are axes of ``b`` alone, and
stacked layers are axes of both and of ``scale``. So every operation that moves, cuts or selects
axes does the same to each array.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad._core.optional_packages import need


@functools.cache
def low_rank_type() -> Any:
    """Makes the type; quax, which it extends, is imported here.

    Raises:
        ImportError: If quax is not installed; the message names the extra.
    """
    quax = need("quax", "quax", "lowrank")
    import equinox

    from unrollgrad.noise import _rules

    class LowRank(quax.ArrayValue):
        w: jax.Array
        a: jax.Array
        b: jax.Array
        scale: jax.Array
        name: str = equinox.field(static=True)

        def aval(self):
            return jax.typeof(self.w)

        def materialise(self):
            return materialised(self, "the code outside of the step's primitives")

        @staticmethod
        def default(primitive, values, params):
            return _rules.apply(primitive, values, params)

    return LowRank


def is_low_rank(x: object) -> bool:
    """Whether ``x`` is a leaf with low-rank noise."""
    return bool(low_rank_type.cache_info().currsize) and isinstance(x, low_rank_type())


def of(other: Any, w: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> Any:
    """Makes a leaf of ``other``'s name, or a plain array if its factors are as large."""
    made = low_rank_type()(w, a, b, scale, other.name)
    return added_up(made) if w.size <= a.size + b.size else made


def added_up(leaf: Any) -> jax.Array:
    """Computes w + scale a b'."""
    product = jnp.sum(leaf.a * leaf.b, axis=-1) * leaf.scale
    return (leaf.w.astype(product.dtype) + product).astype(leaf.w.dtype)


def materialised(leaf: Any, by: str) -> jax.Array:
    """Computes w + scale a b', and warns about the memory if that is larger than the factors."""
    if leaf.w.size > leaf.a.size + leaf.b.size:
        mebibytes = leaf.w.size * leaf.w.dtype.itemsize / 2**20
        warnings.warn(
            f"theta{leaf.name} is materialised for every perturbed theta, {mebibytes:.3g} MiB each "
            f"({leaf.w.dtype}[{','.join(map(str, leaf.w.shape))}]): {by} does not understand "
            "low-rank noise. Matrix products, convolutions, row lookups and scans over layers do, "
            "if the law's `stacked=` suits the leaf: 0 for a kernel of attention or of a "
            "convolution, 1 for a stack of layers, and 1 for a bias with two axes, which then has "
            "dense noise. Or raise `dense_below`, so that the leaf has dense noise.",
            stacklevel=2,
        )
    return added_up(leaf)
