"""Families of positive semidefinite matrices, one for each leaf of the weights.

A ``Structure`` is a pair of pure functions; write another the same way.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments
from unrollgrad._core.dtypes import wide
from unrollgrad.types import ArrayTree

__all__ = [
    "FACTORIES",
    "Structure",
    "by_shape",
    "dense",
    "diagonal",
    "frozen",
    "identity",
    "kronecker",
]

_Leaf = jax.Array | jax.ShapeDtypeStruct


class Structure(NamedTuple):
    """A family of positive semidefinite matrices P, linear maps of arrays like one leaf.

    Attributes:
        init: ``init(leaf) -> factors``, the factors of P = I as a pytree of floating arrays. It may
            use the leaf's shape and dtype only.
        multiply: ``multiply(factors, x)`` is P x, with the shape of x. P must be positive
            semidefinite for all factors, because they are learned without constraints.
    """

    init: Callable[..., ArrayTree]
    multiply: Callable[..., jax.Array]


def kronecker() -> Structure:
    """P = (A ⊗ B) diag(vec S)² (A ⊗ B)ᵀ, for a matrix of weights (inputs, outputs).

    P X = A (S² ∘ (Aᵀ X B)) Bᵀ with unconstrained A (inputs, inputs), B (outputs, outputs) and
    S (inputs, outputs): positive semidefinite for all of them, without an inverse or an
    eigendecomposition. It is KFAC if A and B are the eigenvectors of KFAC's two factors and S the
    inverse roots of the products of their eigenvalues.

    The outputs of a leaf are its last axis, the inputs are all other axes together: a convolution's
    kernel (height, width, channels in, channels out) acts on unfolded patches.

    Time: four products of a matrix of weights with A or B. Memory: A, B and S.
    """

    def init(leaf):
        rows, columns = _matrix_shape(leaf)
        dtype = _dtype(leaf)
        ones = jnp.ones((rows, columns), dtype)
        return {"a": jnp.eye(rows, dtype=dtype), "b": jnp.eye(columns, dtype=dtype), "s": ones}

    def multiply(factors, x):
        a, b, s = (factors[name].astype(x.dtype) for name in ("a", "b", "s"))
        inside = s**2 * (a.T @ x.reshape(s.shape) @ b)
        return (a @ inside @ b.T).reshape(x.shape)

    return Structure(init, multiply)


def dense() -> Structure:
    """P = F Fᵀ with any square F: for a leaf of few numbers d. Time and memory: d².

    Raises:
        ValueError: In ``init``, if the leaf has more than 16,384 numbers.
    """

    def init(leaf):
        size = math.prod(leaf.shape)
        if size > 16_384:
            raise ValueError(
                f"apo.dense() for {arguments.describe(leaf)} would keep {size} x {size} numbers, "
                f"{4 * size**2 / 2**30:.0f} GiB. Use apo.kronecker() or apo.diagonal() for it."
            )
        return {"f": jnp.eye(size, dtype=_dtype(leaf))}

    def multiply(factors, x):
        f = factors["f"].astype(x.dtype)
        return (f @ (f.T @ x.ravel())).reshape(x.shape)

    return Structure(init, multiply)


def diagonal() -> Structure:
    """P = diag(s)²: a rate for each number. Memory: one copy of the leaf."""
    return Structure(lambda leaf: {"s": jnp.ones(leaf.shape, _dtype(leaf))}, _scaled)


def identity() -> Structure:
    """P = s² I: one rate for the whole leaf. Memory: one number."""
    return Structure(lambda leaf: {"s": jnp.ones((), _dtype(leaf))}, _scaled)


def frozen() -> Structure:
    """P = 0: the leaf does not change."""
    return Structure(lambda leaf: {}, lambda factors, x: jnp.zeros_like(x))


def by_shape(largest: int = 1024) -> Callable[[str, _Leaf], Structure]:
    """The default rule: matrices and kernels of convolutions ``kronecker``, others ``diagonal``.

    A single number is ``identity``. A matrix with more than ``largest`` inputs or outputs, such as
    an embedding, is ``diagonal``: a factor would have the square of that many numbers. Kernels with
    several output axes (attention heads) need a rule of yours.

    Args:
        largest: Largest number of inputs or outputs that gets a factor.

    Raises:
        TypeError: If ``largest`` is not a whole number.
        ValueError: If it is below one.
    """
    largest = arguments.positive_int("largest", largest)

    def rule(path: str, leaf: _Leaf) -> Structure:
        if len(leaf.shape) == 0:
            return identity()
        if len(leaf.shape) >= 2 and max(_matrix_shape(leaf)) <= largest:
            return kronecker()
        return diagonal()

    return rule


FACTORIES = (kronecker, dense, diagonal, identity, frozen, by_shape)
"""Functions that must be called before they can be passed as ``structure``."""


def _scaled(factors: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return factors["s"].astype(x.dtype) ** 2 * x


def _matrix_shape(leaf: _Leaf) -> tuple[int, int]:
    """Number of inputs (all axes but the last) and outputs (the last axis) of a leaf."""
    return math.prod(leaf.shape[:-1]), math.prod(leaf.shape[-1:])


def _dtype(leaf: _Leaf) -> jnp.dtype:
    """At least float32: in 16 bits, small changes of a factor would be rounded away."""
    return wide(leaf.dtype)
