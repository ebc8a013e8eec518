"""Laws of the best response: how the weights follow the hyperparameters."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad.stn import _scaled
from unrollgrad.stn.losses import plus
from unrollgrad.types import ArrayTree, Key, Theta

__all__ = ["Response", "linear", "scaled_rows"]


class Response(NamedTuple):
    """A law: a pair of pure functions.

    Attributes:
        init: ``init(key, params, theta) -> weights``, the response's own weights: any pytree of
            floating arrays.
        apply: ``apply(weights, offset) -> move``, a tree like params. ``offset`` is a tree like
            theta, in at least float32: theta minus its current value (``delta_stn``), or theta
            itself (``stn``). For ``delta_stn`` the move must be linear in ``offset``.
        shared: ``shared(weights, params, offset, linear) -> moved params``, for several
            perturbations in a batch, whose weights are then not added up for each of them: leaves
            may be array types of quax. ``linear``: the value and the tangent are needed only where
            the move is zero. Default: params plus the move.
    """

    init: Callable[[Key, Any, Theta], ArrayTree]
    apply: Callable[[Any, Theta], Any]
    shared: Callable[[Any, Any, Theta, bool], Any] | None = None


class Rows(NamedTuple):
    """The response of one leaf of params: weights whose rows are scaled by scales @ offset."""

    weights: jax.Array
    scales: jax.Array


def linear() -> Response:
    """Every weight responds linearly to every hyperparameter, without any structure.

    The best response to first order is in this law, whatever the model. Memory: P numbers for each
    weight, where P is the number of hyperparameters; for small models.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> law = ug.stn.linear()
        >>> weights = law.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.zeros(2))
        >>> weights["w"].shape, law.apply(weights, jnp.ones(2))["w"].shape
        ((4, 3, 2), (4, 3))
    """

    def init(key, params, theta):
        del key
        return jax.tree.map(lambda x: _zeros(x, theta), params)

    def apply(weights, offset):
        offset = as_vector(offset)
        return jax.tree.map(lambda x: _along(x, offset), weights)

    return Response(init, apply)


def scaled_rows(axis: int | tuple[int, ...] = -1, *, initial_std: float = 0.0) -> Response:
    """The structure of the papers: a second matrix, whose rows the hyperparameters scale.

    A leaf W of two axes or more moves by diag(V d) R: d is the offset of the hyperparameters, R has
    W's shape, and V d has one number for each output of the layer. So the network keeps its layers
    and the response costs a second network of the same size. Leaves with less axes (biases, scales)
    respond linearly, without R.

    The outputs of a layer are the last axis in flax, haiku and most of JAX: of a dense matrix
    (inputs, outputs), of a convolution (height, width, inputs, outputs), of a recurrent cell's
    matrix (inputs, gates) and of an embedding (words, features). Where they come first, as in
    PyTorch or equinox, say ``axis=0``; for the heads of an attention layer ``axis=(-2, -1)``; for
    layers that are stacked along a first axis ``axis=(0, -1)``.

    R begins with normal numbers of the size of W's (of std 1/sqrt(inputs) if W is zero), and V at
    zero, so that the response begins at zero, as in Delta-STN.

    Memory: for each leaf its own size and P numbers for each output, where P is the number of
    hyperparameters. With several perturbations in a batch, their groups share W and R: x (W + R s)
    is computed as x W + (x R) s. That needs quax (the extra ``lowrank``); without it, and in
    operations other than products, convolutions and lookups, each group has a copy of W.

    Args:
        axis: The axis, or the axes, of the outputs.
        initial_std: The standard deviation of V's first numbers; 0.01 in the first paper.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> law = ug.stn.scaled_rows()
        >>> weights = law.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.zeros(2))
        >>> [x.shape for x in weights["w"]]
        [(4, 3), (1, 3, 2)]

    References:
        MacKay, Vicol, Lorraine, Duvenaud and Grosse, Self-tuning networks, ICLR 2019,
        arXiv:1903.03088. The learned scalar of its released code is left out.
    """
    axes = axis if isinstance(axis, tuple) else (axis,)
    if not axes or not all(isinstance(i, int) for i in axes):
        raise TypeError(f"`axis` must be a whole number, or a tuple of them; got {axis!r}.")

    def init(key, params, theta):
        leaves, structure = jax.tree.flatten(params)
        made = [_rows(jax.random.fold_in(key, i), x, theta) for i, x in enumerate(leaves)]
        return structure.unflatten(made)

    def _rows(key, x, theta):
        if x.ndim < 2:
            return _zeros(x, theta)
        where = [i + x.ndim if i < 0 else i for i in axes]
        if len(set(where)) < len(where) or not all(0 <= i < x.ndim for i in where):
            raise ValueError(
                f"`axis`={axis} does not fit weights of shape {x.shape}. Give the axes of the "
                "outputs, each once, or write a response of your own."
            )
        outputs = tuple(x.shape[i] if i in where else 1 for i in range(x.ndim))
        dtype, inputs = wide(x.dtype), x.size / math.prod(outputs)
        size = jnp.sqrt(jnp.mean(jnp.square(x.astype(dtype))))
        std = jnp.where(size > 0, size, inputs**-0.5)
        of_weights, of_scales = jax.random.split(key)
        weights = (std * jax.random.normal(of_weights, x.shape, dtype)).astype(x.dtype)
        # An axis of length one in place of every axis but the outputs': rows broadcast.
        shape = (*(n for n in outputs), sum(leaf.size for leaf in jax.tree.leaves(theta)))
        scales = initial_std * jax.random.normal(of_scales, shape, dtype)
        return Rows(weights, scales)

    def apply(weights, offset):
        offset = as_vector(offset)

        def leaf(x):
            if not isinstance(x, Rows):
                return _along(x, offset)
            with standard_promotion():
                return x.weights * _along(x.scales, offset).astype(x.weights.dtype)

        return jax.tree.map(leaf, weights, is_leaf=lambda x: isinstance(x, Rows))

    def shared(weights, params, offset, linear):
        offset = as_vector(offset)

        def leaf(x, like):
            if not isinstance(x, Rows):
                return plus(like, _along(x, offset).astype(like.dtype))
            scales = _along(x.scales, offset).astype(like.dtype)
            return _scaled.scaled(like, x.weights.astype(like.dtype), scales, linear)

        return jax.tree.map(leaf, weights, params, is_leaf=lambda x: isinstance(x, Rows))

    return Response(init, apply, shared)


def as_vector(tree: Any) -> jax.Array:
    """All numbers of a tree in one vector, in at least float32."""
    leaves = jax.tree.leaves(tree)
    return jnp.concatenate([x.ravel().astype(wide(*leaves)) for x in leaves])


def _zeros(x: jax.Array, theta: Theta) -> jax.Array:
    size = sum(leaf.size for leaf in jax.tree.leaves(theta))
    return jnp.zeros((*x.shape, size), wide(x.dtype))


def _along(jacobian: jax.Array, offset: jax.Array) -> jax.Array:
    with standard_promotion():
        return jnp.tensordot(jacobian, offset.astype(jacobian.dtype), 1)
