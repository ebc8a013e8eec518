"""Shortens a step that would raise its own proximal objective: what keeps APO from diverging.

Hyperparameters follow the objective at a bounded speed, about 10 % in a meta-step. Without noise
the steep directions vanish from the gradient, nothing but the flat ones is seen, and the rate rises
above what the steep ones bear: they return, larger by some factor in every step, faster than the
rate can fall.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

RISE = 3.0
"""How much a step may raise the objective, in units of what recent steps lowered it by.

Steps with momentum do so without being too long: up to 2.5 of these units in 24 short trainings
of two networks on digits with SGD, momentum, RMSprop and Adam.
"""

DECAY = 0.9
"""Share of the mean that remains at the next check."""

HALVINGS = 40
"""After so many halvings the step is left out: its direction does not lead down."""


class Safeguard(NamedTuple):
    """What is known about the last checks.

    Attributes:
        lowered: Decaying sum of what the steps lowered the objective by; 0 for one that raised it.
        weight: Sum of the weights in ``lowered``.
        shortened: Whether the last step was shortened; the next one is checked then.
        total_shortened: Number of shortened steps.
    """

    lowered: jax.Array
    weight: jax.Array
    shortened: jax.Array
    total_shortened: jax.Array


def begin() -> Safeguard:
    """Nothing is known: the first step may not raise the objective at all."""
    kinds = jnp.float32, jnp.float32, bool, jnp.int32
    return Safeguard(*(jnp.zeros((), kind) for kind in kinds))


def _rounding(before: jax.Array) -> jax.Array:
    return 8 * jnp.finfo(before.dtype).eps * jnp.abs(before)


def is_too_long(safeguard: Safeguard, before: jax.Array, after: jax.Array) -> jax.Array:
    """Whether a step raises the objective from ``before`` to ``after`` by more than usual.

    Without a finite value before, nothing can be compared.
    """
    usual = (safeguard.lowered / jnp.maximum(safeguard.weight, 1e-9)).astype(before.dtype)
    return ~(after <= before + RISE * usual + _rounding(before)) & jnp.isfinite(before)


def share(too_long: jax.Array, before: jax.Array, at: Callable[..., jax.Array]) -> jax.Array:
    """The share of the step that is taken: 1, or the largest 2^-k that leads no higher.

    The search is a loop over a whole number without derivative, so that reverse mode passes it.

    Args:
        too_long: Whether to search at all.
        before: The objective without a step.
        at: The objective after a share of the step.
    """

    def of(k):
        return jnp.exp2(-k.astype(jnp.float32))

    def search():
        def rises(k):
            return (k < HALVINGS) & ~(at(of(k)) <= before + _rounding(before))

        return jax.lax.while_loop(rises, lambda k: k + 1, jnp.int32(0))

    k = jax.lax.cond(too_long, search, lambda: jnp.int32(0))
    return jnp.where(k < HALVINGS, of(k), jnp.float32(0))


def remember(
    safeguard: Safeguard,
    too_long: jax.Array,
    before: jax.Array,
    after: jax.Array,
    scale: jax.Array,
) -> Safeguard:
    """What is known after the step; of one that was too long, only that it was."""
    known = ~too_long & jnp.isfinite(after) & jnp.isfinite(before) & (after != before)
    drop = jax.lax.stop_gradient(jnp.maximum(before - after, 0)).astype(safeguard.lowered.dtype)
    return Safeguard(
        jnp.where(known, DECAY * safeguard.lowered + (1 - DECAY) * drop, safeguard.lowered),
        jnp.where(known, DECAY * safeguard.weight + (1 - DECAY), safeguard.weight),
        scale < 1,
        safeguard.total_shortened + (scale < 1).astype(jnp.int32),
    )
