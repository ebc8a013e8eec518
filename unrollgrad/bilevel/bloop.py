"""Bloop: an auxiliary loss that is minimised among the minimisers of the main loss."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad.types import Numeric

__all__ = ["BloopState", "bloop"]


class BloopState(NamedTuple):
    """The state of ``bloop``.

    Attributes:
        average: Moving average of the main gradient, in at least float32. It begins at zero and is
            not corrected for that, because its direction alone is used.
    """

    average: optax.Updates


def bloop(weight: Numeric, decay: Numeric = 0.9) -> optax.GradientTransformationExtraArgs:
    """Adds the auxiliary gradient, without its component along the mean main gradient (Bloop).

    For the problem: minimise the auxiliary loss among the minimisers of the main loss. With g the
    main gradient, which is ``updates``, and h the auxiliary one, a step is

        m <- decay m + (1 - decay) g
        d  = g + weight (h - m (mᵀ h) / (mᵀ m))

    so d is g plus something orthogonal to m. Where m is parallel to g, the main loss descends as
    fast as without the auxiliary loss, to first order in the step. A sum of the two losses has no
    such property: its minimum is a compromise, for every weight.

    The fixed points are the points where g = 0 and the auxiliary loss has no slope along the set of
    minimisers. With constant steps the distance to the set stays of the order of step size x weight
    if the set has two or more normal directions, since one step removes one direction alone. If it
    has one normal direction and the set is flat, there is no such floor.

    m is an average because a batch's gradient is mostly noise near the set: without it (decay = 0)
    a random direction is removed, and the auxiliary loss pulls away from the set. A large decay
    lags behind where the normal direction turns.

    The orthogonality is that of d: an optimizer after it in the chain which rescales each entry
    (Adam) keeps it only approximately. The projection is one for all leaves together. In
    ``shard_map`` or ``pmap`` average both gradients over the devices first.

    Time: two inner products and three sums of the size of the weights, beside the second gradient
    that the user takes. Memory: one copy of the weights in at least float32.

    Args:
        weight: Weight of the auxiliary gradient, at least 0, in units of main loss per auxiliary
            loss. ``optax.inject_hyperparams(bilevel.bloop)`` schedules it.
        decay: Decay of the moving average per step, in [0, 1). The paper's rho is 1 - decay.

    Returns:
        A transform whose ``update(updates, state, params, *, auxiliary)`` needs the auxiliary
        gradient, a pytree like ``updates``. A main gradient that is not finite makes the updates
        of its step NaN and leaves the average as it was, so that ``optax.apply_if_finite`` around
        the rest of the chain can skip it; an auxiliary gradient that is not finite also makes them
        NaN. Under ``optax.MultiSteps`` the auxiliary gradient is that of the last small step.

    Raises:
        TypeError: If an argument is not a number; in ``init``, if a leaf of params is not floating.
        ValueError: If weight is negative or decay is not in [0, 1); in ``update``, if ``auxiliary``
            is missing or its leaves differ from those of ``updates``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, unrollgrad as ug
        >>> main, auxiliary = lambda w: (w[0] - 1.0) ** 2, lambda w: jnp.sum((w - 3.0) ** 2)
        >>> optimizer, w = optax.chain(ug.bilevel.bloop(0.5), optax.sgd(0.1)), jnp.zeros(2)
        >>> def step(i, carry):
        ...     w, state = carry
        ...     extra = {"auxiliary": jax.grad(auxiliary)(w)}
        ...     updates, state = optimizer.update(jax.grad(main)(w), state, w, **extra)
        ...     return optax.apply_updates(w, updates), state
        >>> w, _ = jax.lax.fori_loop(0, 200, step, (w, optimizer.init(w)))
        >>> print(f"{w[0]:.3f} {w[1]:.3f}")
        1.000 3.000

    References:
        Hsieh, Thornton, Ndiaye, Klein, Cuturi and Ablin, Careful with that scalpel: improving
        gradient surgery with an EMA, ICML 2024, arXiv:2402.02998.
    """
    arguments.number("weight", weight)
    arguments.number("decay", decay)
    if not isinstance(decay, jax.core.Tracer) and not decay < 1:
        raise ValueError(f"`decay` must be in [0, 1); got {decay}. 0.9 and 0.99 are usual.")

    def init(params):
        abstract = jax.tree.map(_concrete, params)
        arguments.floating_leaves("params", abstract, "Train the floating leaves alone.")
        return BloopState(jax.tree.map(jnp.zeros_like, _widened(abstract)))

    def update(updates, state, params=None, *, auxiliary=None, **extra_args):
        del params, extra_args
        updates = jax.tree.map(jnp.asarray, updates)
        _check(updates, auxiliary)
        with standard_promotion():
            main, other = _widened(updates), _widened(auxiliary)
            mean = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, state.average, main)
            square = _dot(mean, mean)
            share = _dot(mean, other) / jnp.where(square == 0, 1, square)
            found = jax.tree.map(lambda g, h, m: g + weight * (h - share * m), main, other, mean)
            usable = jnp.isfinite(optax.tree.sum(jax.tree.map(jnp.sum, main)))
        kept = jax.tree.map(
            lambda new, old: jnp.where(usable, new, old).astype(old.dtype), mean, state.average
        )
        found = jax.tree.map(
            lambda d, g: mesh_axes.sharded_like(d.astype(g.dtype), g), found, updates
        )
        return found, BloopState(kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _concrete(x: Any) -> Any:
    """Zeros in the place of an abstract weight, which optax's tools begin a state with."""
    return jnp.zeros(x.shape, x.dtype) if isinstance(x, jax.ShapeDtypeStruct) else x


def _dot(a: Any, b: Any) -> Any:
    """The inner product as sums of products, which explicit shardings admit."""
    return optax.tree.sum(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))


def _widened(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, wide(jnp.asarray(x).dtype)), tree)


def _check(updates: optax.Updates, auxiliary: Any) -> None:
    """Raises ValueError if the auxiliary gradient does not fit the main one."""
    if auxiliary is None and jax.tree.leaves(updates):
        raise ValueError(
            "`bloop` needs the gradient of the auxiliary loss: update(updates, state, params, "
            "auxiliary=jax.grad(auxiliary_loss)(params))."
        )
    ours, theirs = jax.tree.structure(updates), jax.tree.structure(auxiliary)
    if ours != theirs:
        raise ValueError(
            f"`auxiliary` must be a pytree like `updates`; got {theirs} and {ours}. Take both "
            "gradients with respect to the same params."
        )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(auxiliary), strict=True
    )
    for (path, x), y in pairs:
        if np.shape(x) != np.shape(y):
            raise ValueError(
                f"auxiliary{jax.tree_util.keystr(path)} is {arguments.describe(y)}, but the "
                f"leaf of `updates` is {arguments.describe(x)}. Take both gradients with respect "
                "to the same params."
            )
