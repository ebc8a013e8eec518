"""Learned optimizers that apply one small MLP to every weight, with one matrix product for all.

The MLP maps a weight's features to two outputs d and m; the weight moves by
``-step * d * exp(magnitude * m)``.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._checks import arguments
from unrollgrad._core import mesh_axes
from unrollgrad._core.dtypes import standard_promotion, wide
from unrollgrad.learned_optimizers import features, networks
from unrollgrad.types import ArrayTree

__all__ = ["Controller", "Memory", "PerWeightState", "averaging", "check_hidden", "transform_of"]


class PerWeightState(NamedTuple):
    """The state of these optimizers.

    Attributes:
        count: int32, number of steps so far.
        memory: What the tensors remember: a tree like the weights for each part of a ``Memory``.
        controller: The recurrent network's memory, (tensors, units); () without a controller.
    """

    count: jax.Array
    memory: ArrayTree
    controller: jax.Array | tuple[()]


class Memory(NamedTuple):
    """The memory of a tensor, and the features of its weights.

    Attributes:
        begin: ``begin(zeros)``, the initial memory, from zeros like the weights.
        see: ``see(memory, gradient, weights)`` returns features (*shape, features), beginning with
            the gradient and the weights, and the next memory.
    """

    begin: Callable[[jax.Array], ArrayTree]
    see: Callable[..., tuple[jax.Array, ArrayTree]]


class Controller(NamedTuple):
    """A recurrent network that controls whole tensors.

    Attributes:
        begin: ``begin(number of tensors)``, its initial memory.
        control: ``control(theta, memory, features)`` with the tensors' features (tensors, features)
            returns the next memory; a term for the first layer of the MLP, (tensors, units); and
            log magnitudes, (tensors,).
    """

    begin: Callable[[int], jax.Array]
    control: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def averaging(decays: Sequence[float]) -> Memory:
    """A memory of averaged gradients; features: gradient, weight, and these averages."""

    def begin(zeros: jax.Array) -> jax.Array:
        return jnp.stack([zeros] * len(decays), axis=-1)

    def see(old: jax.Array, g: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = features.averages(old, g, decays)
        return jnp.concatenate([g[..., None], w[..., None], new], axis=-1), new

    return Memory(begin, see)


def transform_of(
    memory: Memory,
    controller: Controller | None,
    times: Sequence[float],
    step: float,
    magnitude: float,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """Returns ``transform(theta)`` for theta = {"layers": ...} plus the controller's weights.

    Leaves without numbers, and leaves whose gradient is None, do not change. Weights of an explicit
    sharding (``jax.sharding.AxisType.Explicit``) are gathered, with their memories, on every
    device; the updates have the weights' sharding.
    """

    def outputs(theta, state, active, seen):
        """Both outputs for every weight of the active tensors, and the controller's next memory."""
        time = features.time(state.count, times, jnp.float32)
        if controller is None:
            return _through(theta["layers"], seen, time, None), state.controller
        active = jnp.array(active)
        read = jnp.stack([features.of_tensor(x, time) for x in seen])
        own, context, logs = controller.control(theta, state.controller[active], read)
        both = _through(theta["layers"], seen, time, context)
        both = [(d, m + logs[i]) for i, (d, m) in enumerate(both)]
        return both, state.controller.at[active].set(own.astype(state.controller.dtype))

    def transform(theta):
        @standard_promotion()
        def update(updates, state, params=None, **extra_args):
            if params is None:
                raise ValueError(
                    "a learned optimizer looks at the weights: call update(grads, state, params)."
                )
            weights, structure = jax.tree.flatten(params)
            moves = structure.flatten_up_to(updates)
            remembered = _by_tensor(memory, structure, state.memory)
            active = [i for i, g in enumerate(moves) if g is not None and jnp.size(g)]
            seen = []
            for i in active:
                g, w = (
                    mesh_axes.whole(jnp.asarray(x, wide(jnp.result_type(x))))
                    for x in (moves[i], weights[i])
                )
                found, remembered[i] = memory.see(remembered[i], g, w)
                seen.append(found)
            both, controlled = [], state.controller
            if active:
                both, controlled = outputs(theta, state, active, seen)
            for i, (d, m) in zip(active, both, strict=True):
                g, move = jnp.asarray(moves[i]), -step * d * jnp.exp(magnitude * m)
                moves[i] = mesh_axes.sharded_like(move.reshape(g.shape).astype(g.dtype), g)
            parts = _by_part(memory, structure, remembered)
            return structure.unflatten(moves), PerWeightState(state.count + 1, parts, controlled)

        return optax.GradientTransformationExtraArgs(
            functools.partial(_begin, memory, controller), update
        )

    return transform


def _begin(memory: Memory, controller: Controller | None, params: optax.Params) -> PerWeightState:
    leaves, structure = jax.tree.flatten(params)
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        if jnp.issubdtype(arguments.dtype_of(w), jnp.complexfloating):
            raise TypeError(
                f"a learned optimizer updates real weights; params{jax.tree_util.keystr(path)} is "
                f"{arguments.dtype_of(w)}. Train the others (optax.masked), or hold its real and "
                "imaginary parts as two leaves."
            )
    zeros = [mesh_axes.whole(jnp.zeros_like(w, wide(arguments.dtype_of(w)))) for w in leaves]
    remembered = [memory.begin(x) for x in zeros]
    return PerWeightState(
        jnp.zeros((), jnp.int32),
        _by_part(memory, structure, remembered),
        () if controller is None else controller.begin(len(leaves)),
    )


def _parts(memory: Memory) -> jax.tree_util.PyTreeDef:
    """The structure of a tensor's memory."""
    return jax.tree.structure(jax.eval_shape(memory.begin, jnp.zeros((1, 1))))


def _by_part(
    memory: Memory, structure: jax.tree_util.PyTreeDef, remembered: list[ArrayTree]
) -> ArrayTree:
    """The tensors' memories as one tree like the weights for each part, as optax's tools expect."""
    parts = _parts(memory)
    columns = [[] for _ in range(parts.num_leaves)]
    for one in remembered:
        for column, x in zip(columns, parts.flatten_up_to(one), strict=True):
            column.append(x)
    return parts.unflatten(map(structure.unflatten, columns))


def _by_tensor(
    memory: Memory, structure: jax.tree_util.PyTreeDef, state: ArrayTree
) -> list[ArrayTree]:
    """The inverse of ``_by_part``."""
    parts = _parts(memory)
    columns = map(structure.flatten_up_to, parts.flatten_up_to(state))
    return [parts.unflatten(row) for row in zip(*columns, strict=True)]


def _through(
    layers: list[networks.Layer],
    seen: list[jax.Array],
    time: jax.Array,
    context: jax.Array | None,
) -> list[tuple[jax.Array, jax.Array]]:
    """Both outputs of the MLP for every weight of every tensor, computed in one product.

    The time is common to all weights and multiplies its part of the first layer once.
    """
    first, *others = layers
    own = seen[0].shape[-1]
    shared = time @ first["kernel"][own:]
    layers = [{**first, "kernel": first["kernel"][:own]}, *others]
    rows = [features.normalised(x) for x in seen]
    sizes = [len(x) for x in rows]
    if context is not None:
        parts = [jnp.broadcast_to(c, (n, len(c))) for c, n in zip(context, sizes, strict=True)]
        shared = shared + jnp.concatenate(parts)
    out = networks.apply_layers(layers, jnp.concatenate(rows), shared)
    ends = list(itertools.accumulate(sizes))[:-1]
    return list(zip(jnp.split(out[:, 0], ends), jnp.split(out[:, 1], ends), strict=True))


def check_hidden(hidden: Sequence[int]) -> None:
    """Raises if the network has no hidden units."""
    if not hidden or any(units < 1 for units in hidden):
        raise ValueError(f"`hidden` must be units of at least one layer; got {tuple(hidden)}.")
