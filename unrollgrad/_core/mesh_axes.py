"""Inside ``jax.shard_map``: values that differ between devices, and gradients that stay local.

If a replicated theta is used with data that varies over devices, ``jax.grad`` silently *sums* its
gradient over the devices. If theta is made varying first, each worker keeps its own gradient.
"""

from typing import Any

import jax


def axes(tree: object) -> frozenset[str]:
    """Returns the mesh axes over which any leaf varies; empty outside ``shard_map``."""
    return frozenset().union(
        *(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree))
    )


def over(names: frozenset[str], tree: Any) -> Any:
    """Makes every leaf of ``tree`` vary over the axes ``names``, in addition to its own axes."""

    def leaf(x):
        missing = tuple(sorted(names - jax.typeof(x).manual_axis_type.varying))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(leaf, tree) if names else tree


def like(other: Any, tree: Any) -> Any:
    """Makes every leaf of ``tree`` vary over the axes of its counterpart in ``other`` as well.

    ``other`` has arrays, or what ``jax.eval_shape`` returns.
    """
    return jax.tree.map(lambda a, x: over(axes(a), x), other, tree)


def whole(x: jax.Array) -> jax.Array:
    """Puts an array of an explicit sharding on every device as a whole; others stay as they are."""
    spec = jax.sharding.PartitionSpec(*[None] * x.ndim)
    return jax.sharding.reshard(x, spec) if _is_explicit(x) else x


def sharded_like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Gives ``x`` the explicit sharding of ``other``, if it has one."""
    return jax.sharding.reshard(x, jax.typeof(other).sharding) if _is_explicit(other) else x


def _is_explicit(x: jax.Array) -> bool:
    """Whether the sharding is part of the type (``AxisType.Explicit``), and not trivial."""
    sharding = jax.typeof(x).sharding
    named = any(axis is not None for axis in sharding.spec)
    return named and bool(sharding.mesh.explicit_axes)
