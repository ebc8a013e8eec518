"""Inside ``jax.shard_map``: values that differ between devices, and gradients that stay local.

A replicated theta used with device-varying data gets its gradient *summed* over the devices by
``jax.grad``, silently. Making theta varying first keeps each worker's gradient its own.
"""

from typing import Any

import jax


def axes(tree: Any) -> frozenset:
    """The mesh axes over which any leaf varies; empty outside ``shard_map``."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree))
    )


def over(names: frozenset, tree: Any) -> Any:
    """``tree`` with every leaf varying over the axes ``names``, in addition to its own."""

    def leaf(x):
        missing = tuple(sorted(names - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree) if names else tree


def like(shapes: Any, tree: Any) -> Any:
    """``tree`` with every leaf varying over the axes of its counterpart, as ``eval_shape`` says."""

    def leaf(shape, x):
        kind = shape.manual_axis_type
        return over(kind.varying, x) if kind else x

    return jax.tree.map(leaf, shapes, tree)
