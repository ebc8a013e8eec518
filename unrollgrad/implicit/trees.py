"""Vectors as pytrees, in one floating dtype of at least float32: what lineax's solvers work on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad import checks


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
    return functools.reduce(jnp.add, jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


def norm(tree: Any) -> jax.Array:
    """The Euclidean norm."""
    return jnp.sqrt(sum(jnp.sum(jnp.abs(x) ** 2) for x in jax.tree.leaves(tree)))


def scale(factor: Any, tree: Any) -> Any:
    """``factor`` times every leaf, in the leaf's dtype."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def add(a: Any, b: Any, factor: Any = 1) -> Any:
    """``a + factor * b``, in the dtypes of a."""
    return jax.tree.map(lambda x, y: (x + factor * y).astype(x.dtype), a, b)


def size(tree: Any) -> int:
    """How many numbers there are."""
    return sum(x.size for x in jax.tree.leaves(tree))


def random_like(key: jax.Array, tree: Any) -> Any:
    """Standard normal numbers."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    )


def check_floating(name: str, tree: Any) -> Any:
    """The tree with leaves that are strongly typed floating arrays.

    Raises:
        TypeError: If a leaf is not floating.
        ValueError: If there are no leaves.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    if not named:
        raise ValueError(f"`{name}` has no leaves; got {tree!r}.")
    for path, leaf in named:
        if not jnp.issubdtype(checks.dtype_of(leaf), jnp.floating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is {checks.describe(leaf)}; `{name}` must "
                "have real floating leaves. Let the functions close over the others."
            )
    return jax.tree.map(checks.strong, tree)


def is_concrete(tree: Any) -> bool:
    """Whether all leaves have values here: nothing is being traced."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))
