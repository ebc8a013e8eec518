"""Rivals of APO: OSGM and KFAC, as optax transformations."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike


class OsgmState(NamedTuple):
    """The scales P, one for each number of the weights."""

    scales: Any


def osgm(
    initial: jax.Array | float, rate: jax.Array | float
) -> optax.GradientTransformationExtraArgs:
    """Steps -P g with a diagonal P that descends the hypergradient feedback (OSGM).

    The feedback h(P) = (f(w - P g) - f(w)) / |g|² has the gradient -(g₊ ∘ g) / |g|², g₊ the
    gradient at w - P g; P takes a step of gradient descent on it. The weights move only if f falls
    (a null step otherwise). f is the loss of the gradient's batch.

    Args:
        initial: The first value of every scale.
        rate: Step size of the scales.

    Returns:
        A transformation whose ``update`` needs ``loss`` and ``batch``, as ``apo.learning_rate``'s.

    References:
        Gao, Chu, Ye, Udell, Gradient methods with online scaling, COLT 2025, arXiv:2411.01803.
    """

    def init(params):
        return OsgmState(jax.tree.map(lambda x: jnp.full_like(x, initial), params))

    def update(updates, state, params=None, **given):
        loss, batch = given["loss"], given["batch"]
        moved = jax.tree.map(lambda p, g: -p * g, state.scales, updates)
        there = jax.tree.map(jnp.add, params, moved)
        value, slope = jax.value_and_grad(loss)(there, batch)
        size = optax.tree.norm(updates, squared=True)
        scale = jnp.where(size > 0, rate / jnp.where(size > 0, size, 1), 0)
        scales = jax.tree.map(lambda p, a, b: p + scale * a * b, state.scales, slope, updates)
        falls = value <= loss(params, batch)
        moved = jax.tree.map(lambda x: jnp.where(falls, x, jnp.zeros_like(x)), moved)
        return moved, OsgmState(scales)

    return optax.GradientTransformationExtraArgs(init, update)


class KfacState(NamedTuple):
    """The number of steps, and the decaying sums of every layer's two factors."""

    count: jax.Array
    factors: Any


def kfac(
    rate: jax.Array | float,
    damping: jax.Array | float,
    factors: Callable[[Any, Any], Mapping[str, tuple[ArrayLike, ArrayLike]]],
    decay: float = 0.95,
) -> optax.GradientTransformationExtraArgs:
    """Steps -rate A⁻¹ G B⁻¹ for each weight matrix: KFAC, with the inverses in every step.

    A and B are decaying means of the layer's factors: E[a aᵀ] of its inputs and E[d dᵀ] of the
    gradients of its outputs under the model's own distribution. The damping is factored:
    A + π √damping I and B + √damping / π I, with π² = (tr A / dim A) / (tr B / dim B).

    Args:
        rate: Step size.
        damping: Damping of the Fisher matrix.
        factors: ``factors(params, batch)``, the two factors of this batch for each matrix by name.
        decay: Share of the old factors that remains in a step.

    References:
        Martens, Grosse, Optimizing neural networks with Kronecker-factored approximate curvature,
        ICML 2015, arXiv:1503.05671.
    """

    def init(params):
        sizes = {name: w.shape for name, w in params.items()}
        zeros = {k: (jnp.zeros((i, i)), jnp.zeros((o, o))) for k, (i, o) in sizes.items()}
        return KfacState(jnp.zeros((), jnp.int32), zeros)

    def update(updates, state, params=None, **given):
        found = factors(params, given["batch"])
        kept = jax.tree.map(lambda x, y: decay * x + (1 - decay) * y, state.factors, found)
        count = state.count + 1
        means = jax.tree.map(lambda x: x / (1 - decay**count), kept)
        moved = {name: -rate * _solved(g, means[name], damping) for name, g in updates.items()}
        return moved, KfacState(count, kept)

    return optax.GradientTransformationExtraArgs(init, update)


def _solved(
    gradient: jax.Array, factors: tuple[jax.Array, jax.Array], damping: jax.Array | float
) -> jax.Array:
    """(A + π √damping I)⁻¹ G (B + √damping / π I)⁻¹."""
    a, b = factors
    ratio = jnp.sqrt((jnp.trace(a) / len(a)) / (jnp.trace(b) / len(b)))
    left = a + ratio * jnp.sqrt(damping) * jnp.eye(len(a))
    right = b + jnp.sqrt(damping) / ratio * jnp.eye(len(b))
    half = jax.scipy.linalg.solve(left, gradient, assume_a="pos")
    return jax.scipy.linalg.solve(right, half.T, assume_a="pos").T
