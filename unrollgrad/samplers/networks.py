"""Networks of samplers: guidance by a condition, and low-rank updates of their weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unrollgrad._checks import arguments
from unrollgrad.samplers import _step
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
        with _step.explained(
            "the network of `guided`",
            "If it cannot take that, pass another `unconditional` to `guided`: the condition that "
            "stands for none, such as zeros of a condition's shape.",
            x=x,
            unconditional=unconditional,
        ):
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
        ValueError: If no leaf is a floating matrix, a matrix is empty, or the rank is below one;
            by ``merge`` if its theta has other leaves or shapes.

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
    paths, leaves = _with_paths(params)
    structure = jax.tree.structure(params, is_leaf=lambda x: x is None)
    thetas = [
        _factors(f"params{path}", jax.random.fold_in(key, i), x, rank)
        for i, (path, x) in enumerate(zip(paths, leaves, strict=True))
    ]
    if all(x is None for x in thetas):
        raise ValueError(
            "`params` has no floating matrix to adapt; got leaves of shapes "
            f"{[np.shape(x) for x in leaves[:8]]}. Train the weights themselves."
        )

    def merge(theta):
        _, updates = _with_paths(theta)
        if len(updates) != len(leaves):
            raise ValueError(
                f"`theta` has {len(updates)} updates for {len(leaves)} leaves of `params`; pass "
                "the theta of the same call of lora, or one of its structure."
            )
        for path, made, update in zip(paths, thetas, updates, strict=True):
            _check_update(f"theta{path}", made, update)
        merged = [_merged(x, u, scale) for x, u in zip(leaves, updates, strict=True)]
        return jax.tree.unflatten(structure, merged)

    return jax.tree.unflatten(structure, thetas), merge


def _with_paths(tree: ArrayTree) -> tuple[list[str], list[Any]]:
    """The leaves and their paths; None, which JAX takes for an empty tree, is a leaf here."""
    found = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda x: x is None or isinstance(x, LowRank)
    )
    return [jax.tree_util.keystr(path) for path, _ in found], [x for _, x in found]


def _factors(path: str, key: Key, x: Any, rank: int) -> LowRank | None:
    if np.ndim(x) < 2 or not jnp.issubdtype(arguments.dtype_of(x), jnp.floating):
        return None
    if np.size(x) == 0:
        raise ValueError(f"{path} is empty: {arguments.describe(x)}. Remove the leaf.")
    columns = np.shape(x)[-1]
    dtype = jnp.promote_types(jnp.float32, arguments.dtype_of(x))
    down = jax.random.normal(key, (np.size(x) // columns, rank), dtype) / rank
    return LowRank(down, jnp.zeros((rank, columns), dtype))


def _check_update(path: str, made: LowRank | None, update: Any) -> None:
    """Raises ValueError unless the update is of the kind and shape that ``lora`` made."""
    if made is None or not isinstance(update, LowRank):
        fits = made is None and update is None
    else:  # of any rank
        down, up = np.shape(update.down), np.shape(update.up)
        fits = (*down[:-1], *up[1:]) == (made.down.shape[0], made.up.shape[1])
        fits = fits and len(down) == len(up) == 2 and down[1] == up[0]
    if not fits:
        raise ValueError(
            f"{path} must be {_form(made)}; got {_form(update)}. Pass the theta of the same call "
            "of lora, or one of its structure and shapes."
        )


def _form(x: Any) -> str:
    if isinstance(x, LowRank):
        return f"LowRank({arguments.describe(x.down)}, {arguments.describe(x.up)})"
    return "None" if x is None else arguments.describe(x)


def _merged(x: Any, update: LowRank | None, scale: Numeric) -> Any:
    if update is None:
        return x
    added = scale * (update.down @ update.up)
    return (jnp.asarray(x, added.dtype) + added.reshape(np.shape(x))).astype(x.dtype)
