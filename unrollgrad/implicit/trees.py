"""Vectors as pytrees, in one floating dtype of at least float32: what lineax's solvers work on.

What ``optax.tree`` has is used from there; these keep the dtypes of their leaves.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments


def dtype(tree: Any) -> Any:
    """The dtype in which a system of these unknowns is solved: at least float32."""
    return jnp.result_type(jnp.float32, *jax.tree.leaves(tree))


def widen(tree: Any) -> Any:
    """All leaves in the one ``dtype``."""
    wide = dtype(tree)
    return jax.tree.map(lambda x: jnp.asarray(x, wide), tree)


def narrow(tree: Any, like: Any) -> Any:
    """Each leaf in the dtype of its counterpart."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product."""
    return jnp.asarray(optax.tree.vdot(a, b))


def scale(factor: Any, tree: Any) -> Any:
    """``factor`` times every leaf, in the leaf's dtype."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def add(a: Any, b: Any, factor: Any = 1) -> Any:
    """``a + factor * b``, in the dtypes of a."""
    return jax.tree.map(lambda x, y: (x + factor * y).astype(x.dtype), a, b)


def check_floating(name: str, tree: Any) -> Any:
    """The tree with leaves that are strongly typed floating arrays.

    Raises:
        TypeError: If a leaf is not floating.
        ValueError: If there are no leaves, or one is empty.
    """
    return arguments.floating(name, tree, "Let the functions close over the others.")


def is_concrete(tree: Any) -> bool:
    """Whether all leaves have values here: nothing is being traced."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
