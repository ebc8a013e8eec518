"""Floating leaves, such as an inner state's: those that have derivatives."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad.types import State


def split(state: State) -> tuple[list[jax.Array], Callable[[list[jax.Array]], State]]:
    """Returns the floating leaves of a state, and a function that replaces them."""
    leaves, structure = jax.tree.flatten(state)
    where = [i for i, x in enumerate(leaves) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def rebuild(floats):
        new = list(leaves)
        for i, x in zip(where, floats, strict=True):
            new[i] = x
        return structure.unflatten(new)

    return [leaves[i] for i in where], rebuild


def floats_of(state: State) -> list[jax.Array]:
    """Returns the floating leaves of a state."""
    return split(state)[0]


def inner_product(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    """Computes the inner product in at least float32."""
    parts = [
        jnp.sum(x.astype(wide(x.dtype)) * y.astype(wide(y.dtype)))
        for x, y in zip(a, b, strict=True)
    ]
    with standard_promotion():
        return sum(parts, jnp.zeros(()))


def unseen(leaves: Sequence[jax.Array]) -> jax.Array:
    """A zero that is linear in every leaf: XLA sees that it is constant, jax does not."""
    corners = [jnp.sum(jnp.ravel(x)[:1]).real.astype(jnp.float32) for x in leaves]
    total = functools.reduce(jnp.add, corners, jnp.float32(0))
    return jax.lax.select(jnp.zeros((), bool), total, jnp.zeros_like(total))
