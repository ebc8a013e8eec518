"""A training loss that is split where the network's outputs are, so that they can be linearised."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad._core.array_types import through
from unrollgrad._core.dtypes import standard_promotion
from unrollgrad.types import ArrayTree, Key, Numeric, Theta

__all__ = ["SplitLoss"]


@dataclasses.dataclass(frozen=True)
class SplitLoss:
    """A loss in two parts: the network's outputs, and the loss of these outputs.

    It is also the whole loss, ``loss(theta, params, batch, key)``, and can be used wherever such a
    function can. ``delta_stn`` linearises the first part in the weights. What the second part needs
    of the weights themselves, such as weight decay, must be among the outputs: return them there.

    Attributes:
        predict: ``predict(theta, params, batch, key) -> outputs``, any pytree of arrays. Dropout
            and whatever else acts inside the network belongs here.
        loss: ``loss(theta, outputs, batch, key) -> scalar``, the mean over the batch.

    Example:
        >>> import jax.numpy as jnp, unrollgrad as ug
        >>> loss = ug.stn.SplitLoss(
        ...     predict=lambda theta, w, x, key: (x @ w, w),
        ...     loss=lambda theta, out, x, key: (
        ...         jnp.mean(out[0] ** 2) + jnp.exp(theta) * jnp.sum(out[1] ** 2)))
        >>> print(loss(0.0, jnp.ones(2), jnp.ones((3, 2)), None))
        6.0
    """

    predict: Callable[..., ArrayTree]
    loss: Callable[..., Numeric]

    def __call__(self, theta: Theta, params: ArrayTree, batch: Any, key: Key) -> Numeric:
        """The whole loss."""
        return self.loss(theta, self.predict(theta, params, batch, key), batch, key)


def moved_loss(
    loss: Callable[..., Numeric], theta: Theta, moved: tuple[Any, Any], batch: Any, key: Key
) -> Numeric:
    """The loss of outputs that are linear in the weights' move: ``moved`` is (params, move).

    Of a loss that is not split, the weights themselves are the outputs.
    """
    params, move = moved
    if not isinstance(loss, SplitLoss):
        return loss(theta, plus(params, move), batch, key)
    outputs, along = jax.jvp(lambda p: loss.predict(theta, p, batch, key), (params,), (move,))
    return loss.loss(theta, plus(outputs, along), batch, key)


def shared_loss(
    loss: Callable[..., Numeric],
    theta: Theta,
    moved: Callable[[Any, bool], Any],
    batch: Any,
    key: Key,
) -> Numeric:
    """``moved_loss`` of weights that the groups of a batch share.

    ``moved(share, linear)`` are the weights after this share of the move, as array types.
    """
    if not isinstance(loss, SplitLoss):
        return on_shared(lambda p: loss(theta, p, batch, key), moved(1.0, False))

    predict = loss.predict

    def predicted(share):
        return on_shared(lambda p: predict(theta, p, batch, key), moved(share, True))

    outputs, along = jax.jvp(predicted, (jnp.zeros(()),), (jnp.ones(()),))
    return loss.loss(theta, plus(outputs, along), batch, key)


def on_shared(function: Callable, params: Any) -> Any:
    """The function of weights that the groups share.

    Raises:
        NotImplementedError: If it calls a function with a rule by ``jax.custom_vjp``.
    """
    return through(function, "`num_perturbations=1`, or `response=ug.stn.linear()`")(params)


def plus(values: Any, moves: Any) -> Any:
    """The sum of two trees in the dtypes of the first; values that cannot move stay."""

    def leaf(x, move):
        if move.dtype == jax.dtypes.float0:
            return x
        with standard_promotion():
            return (x + move).astype(jnp.result_type(x))

    return jax.tree.map(leaf, values, moves)
