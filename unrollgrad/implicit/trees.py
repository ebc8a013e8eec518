"""Arithmetic of vectors that are pytrees, and checks of arguments.

``lineax`` solves in one floating dtype of at least float32. ``optax.tree`` has the functions that
are not here; those that are keep the dtypes of the leaves.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unrollgrad._checks import arguments
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad.types import ArrayTree, Numeric

__all__ = [
    "add",
    "check_floating",
    "check_function",
    "dot",
    "dtype",
    "is_concrete",
    "narrow",
    "scale",
    "widen",
]

T = TypeVar("T")


def dtype(tree: object) -> np.dtype:
    """The dtype in which a system with these unknowns is solved: at least float32."""
    return wide(*jax.tree.leaves(tree))


def widen(tree: T) -> T:
    """Casts all leaves to the one ``dtype``."""
    widest = dtype(tree)
    return jax.tree.map(lambda x: jnp.asarray(x, widest), tree)


def narrow(tree: T, like: ArrayTree) -> T:
    """Casts each leaf to the dtype of its counterpart in ``like``."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def dot(a: T, b: T) -> jax.Array:
    """The inner product."""
    return jnp.asarray(optax.tree.vdot(a, b))


@standard_promotion()
def scale(factor: Numeric, tree: T) -> T:
    """``factor`` times every leaf, in the leaf's dtype."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


@standard_promotion()
def add(a: T, b: T, factor: Numeric = 1) -> T:
    """``a + factor * b``, in the dtypes of ``a``."""
    return jax.tree.map(lambda x, y: (x + factor * y).astype(x.dtype), a, b)


def check_floating(name: str, tree: ArrayTree) -> ArrayTree:
    """Returns the tree with strongly typed arrays as leaves; raises as ``arguments.floating``."""
    return arguments.floating(name, tree, "Let the functions close over the others.")


def check_function(name: str, function: object) -> None:
    """Raises TypeError if ``function`` cannot be called."""
    if not callable(function):
        raise TypeError(f"`{name}` must be a function; got a {type(function).__name__}.")


def is_concrete(tree: object) -> bool:
    """Whether all leaves have values, so that none of them is being traced."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
