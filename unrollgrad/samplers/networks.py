"""Networks of samplers: guidance by a condition, and low-rank updates of their weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad.types import ArrayTree, Key, Numeric

__all__ = ["LowRank", "guided", "lora"]


def guided(
    network: Callable[..., Any],
    scale: Numeric,
    *,
    unconditional: Any = None,
    detach_unconditional: bool = False,
) -> Callable[..., Any]:
    """Classifier-free guidance: a network that is pushed away from its unconditional output.

    output = u + scale (c - u), with c = network(theta, x, t, condition) and u the same with the
    condition ``unconditional``: scale 1 is the conditional network, scale 0 the unconditional one.
    Gradients flow through both, multiplied by ``scale`` and by 1 - scale; with
    ``detach_unconditional`` u is a constant, for theta and for x. A call costs two evaluations of
    the network, which ``info.inner_steps`` counts as one step.

    Args:
        network: A denoiser or velocity, ``network(theta, x, t, condition)``.
        scale: The guidance scale, 7.5 in Stable Diffusion.
        unconditional: The condition that stands for none, of the same structure as the others, such
            as the embedding of the empty prompt.
        detach_unconditional: Whether u has no gradient.

    Returns:
        A network for ``samplers.ddim`` or ``samplers.flow``.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> network = ug.samplers.guided(lambda theta, x, t, c: theta * c, 7.5, unconditional=0.0)
        >>> float(network(2.0, jnp.zeros(()), 0.5, 1.0))
        15.0

    References:
        Ho and Salimans, Classifier-free diffusion guidance, 2022, arXiv:2207.12598.
    """

    def push(theta, x, t, condition):
        toward = network(theta, x, t, condition)
        away = network(theta, x, t, unconditional)
        if detach_unconditional:
            away = jax.lax.stop_gradient(away)
        return away + scale * (toward - away)

    return push


class LowRank(NamedTuple):
    """The low-rank update down @ up of one matrix.

    Attributes:
        down: Shape (inputs, rank).
        up: Shape (rank, outputs), zero at the start.
    """

    down: jax.Array
    up: jax.Array


def lora(
    params: ArrayTree, rank: int, key: Key, *, scale: Numeric = 1.0
) -> tuple[ArrayTree, Callable[[ArrayTree], ArrayTree]]:
    """Low-rank adapters (LoRA) for every matrix of a network's weights.

    A matrix W becomes W + scale down @ up: theta holds only the factors, of rank times (inputs +
    outputs) numbers. ``up`` is zero at the start, so that theta is the pretrained network, and
    ``down`` is normal with standard deviation 1/rank. A leaf of more than two axes, such as a
    convolution, is a matrix with its last axis as columns; vectors and scalars stay as they are.

    A merge costs a product per matrix; its gradient needs one matrix of W's size at a time.

    Args:
        params: The pretrained weights, any pytree.
        rank: The rank (r) of the updates.
        key: For ``down``.
        scale: The factor of the update, alpha/r in the literature.

    Returns:
        ``(theta, merge)``: theta has ``LowRank`` in place of the matrices and None in place of
        other leaves, and ``merge(theta)`` returns the weights, in the dtypes of ``params``.

    Raises:
        ValueError: If no leaf is a floating matrix, or the rank is below one.

    Example:
        >>> import jax, jax.numpy as jnp, unrollgrad as ug
        >>> params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
        >>> theta, merge = ug.samplers.lora(params, 2, jax.random.key(0))
        >>> jax.tree.map(jnp.shape, theta)["w"], bool(jnp.all(merge(theta)["w"] == params["w"]))
        (LowRank(down=(4, 2), up=(2, 3)), True)

    References:
        Hu et al., LoRA: Low-rank adaptation of large language models, ICLR 2022, arXiv:2106.09685.
    """
    rank, key = arguments.positive_int("rank", rank), arguments.typed_key(key)
    leaves, structure = jax.tree.flatten(params, is_leaf=lambda x: x is None)
    thetas = [_factors(jax.random.fold_in(key, i), x, rank) for i, x in enumerate(leaves)]
    if all(x is None for x in thetas):
        raise ValueError(
            "`params` has no floating matrix to adapt; got leaves of shapes "
            f"{[np.shape(x) for x in leaves[:8]]}. Train the weights themselves."
        )

    def merge(theta):
        # None stands for a leaf without an update; by itself JAX takes it for an empty tree.
        updates = jax.tree.leaves(theta, is_leaf=lambda x: x is None or isinstance(x, LowRank))
        if len(updates) != len(leaves):
            raise ValueError(
                f"`theta` has {len(updates)} updates for {len(leaves)} leaves of `params`; pass "
                "the theta of the same call of lora, or one of its structure."
            )
        merged = [_merged(x, u, scale) for x, u in zip(leaves, updates, strict=True)]
        return jax.tree.unflatten(structure, merged)

    return jax.tree.unflatten(structure, thetas), merge


def _factors(key: Key, x: Any, rank: int) -> LowRank | None:
    if np.ndim(x) < 2 or not jnp.issubdtype(arguments.dtype_of(x), jnp.floating):
        return None
    columns = np.shape(x)[-1]
    dtype = jnp.promote_types(jnp.float32, arguments.dtype_of(x))
    down = jax.random.normal(key, (np.size(x) // columns, rank), dtype) / rank
    return LowRank(down, jnp.zeros((rank, columns), dtype))


def _merged(x: Any, update: LowRank | None, scale: Numeric) -> Any:
    if update is None:
        return x
    added = scale * (update.down @ update.up)
    return (jnp.asarray(x, added.dtype) + added.reshape(np.shape(x))).astype(x.dtype)
