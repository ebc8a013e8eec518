"""Families of positive semidefinite matrices, one for each leaf of the weights.

A ``Structure`` is a pair of pure functions; write another the same way.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._checks import arguments


class Structure(NamedTuple):
    """A family of positive semidefinite matrices P, linear maps of arrays like one leaf.

    Attributes:
        init: ``init(leaf) -> factors``, any pytree of floating arrays: those of P = I. The leaf has
            a shape and a dtype.
        multiply: ``multiply(factors, x)`` is P x, of the shape of x. Positive semidefinite for all
            factors, since they are learned without any constraint.
    """

    init: Callable[[Any], Any]
    multiply: Callable[[Any, jax.Array], jax.Array]


def kronecker() -> Structure:
    """P = (A ⊗ B) diag(vec S)² (A ⊗ B)ᵀ, for a matrix of weights (inputs, outputs).

    P X = A (S² ∘ (Aᵀ X B)) Bᵀ with A (inputs, inputs), B (outputs, outputs) and S (inputs,
    outputs), free of constraints: positive semidefinite for all of them, without an inverse or an
    eigendecomposition. With A and B the eigenvectors of KFAC's two factors and S the inverse roots
    of the products of their eigenvalues it is KFAC.

    The last axis of a leaf is its outputs, all others together are its inputs: a convolution's
    kernel (height, width, channels in, channels out) acts on unfolded patches.

    Time: four products of a matrix of weights with A or B. Memory: A, B and S.
    """

    def init(leaf):
        rows, columns = matrix_shape(leaf)
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
    """P = diag(s)²: a rate for each number. Memory: as the leaf."""

    def init(leaf):
        return {"s": jnp.ones(leaf.shape, _dtype(leaf))}

    return Structure(init, lambda factors, x: factors["s"].astype(x.dtype) ** 2 * x)


def identity() -> Structure:
    """P = s² I: one rate for the whole leaf. Memory: one number."""

    def init(leaf):
        return {"s": jnp.ones((), _dtype(leaf))}

    return Structure(init, lambda factors, x: factors["s"].astype(x.dtype) ** 2 * x)


def frozen() -> Structure:
    """P = 0: the leaf stays as it is."""
    return Structure(lambda leaf: {}, lambda factors, x: jnp.zeros_like(x))


def by_shape(largest: int = 1024) -> Callable[[str, Any], Structure]:
    """The default rule: matrices and kernels of convolutions ``kronecker``, others ``diagonal``.

    A single number is ``identity``. A matrix with more than ``largest`` inputs or outputs, such as
    an embedding, is ``diagonal``: its factor would have the square of that many numbers. Kernels
    whose outputs are more than their last axis (attention heads) want a rule of yours.

    Args:
        largest: Inputs or outputs for which there is a factor.

    Raises:
        TypeError: If ``largest`` is not a whole number.
        ValueError: If it is below one.
    """
    largest = arguments.positive_int("largest", largest)

    def rule(path: str, leaf: Any) -> Structure:
        if len(leaf.shape) == 0:
            return identity()
        if len(leaf.shape) >= 2 and max(matrix_shape(leaf)) <= largest:
            return kronecker()
        return diagonal()

    return rule


def matrix_shape(leaf: Any) -> tuple[int, int]:
    """Inputs and outputs of a leaf: all axes but the last, and the last."""
    return math.prod(leaf.shape[:-1]), math.prod(leaf.shape[-1:])


def _dtype(leaf: Any) -> Any:
    """At least float32: in 16 bits a factor would not move by less than its last digit."""
    return jnp.promote_types(leaf.dtype, jnp.float32)
