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
