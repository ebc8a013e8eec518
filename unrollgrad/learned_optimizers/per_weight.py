"""How learned optimizers run that look at one weight at a time: all weights in one product.

Every weight's features go through the same small MLP, whose two outputs d and m move the weight by
``-step * d * exp(magnitude * m)``.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from unrollgrad.learned_optimizers import features, networks
from unrollgrad.noise import wide


class PerWeightState(NamedTuple):
    """The state of these optimizers.

    Attributes:
        count: int32, steps so far.
        memory: What is remembered of each tensor, as a list in the order of the weights' leaves.
        controller: The recurrent network's memory, (tensors, units); () where there is none.
    """

    count: jax.Array
    memory: list[Any]
    controller: Any


class Memory(NamedTuple):
    """What is remembered of a tensor.

    Attributes:
        begin: ``begin(weights)``.
        see: ``see(memory, gradient, weights)`` returns features (*shape, features), the gradient
            and the weights first, and the next memory.
    """

    begin: Callable[[jax.Array], Any]
    see: Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]


class Controller(NamedTuple):
    """What is said of whole tensors.

    Attributes:
        begin: ``begin(number of tensors)``, its memory.
        control: ``control(theta, memory, tensors)`` of the tensors' features (tensors, features)
            returns the next memory; what to add to the first layer, (tensors, units); and log
            magnitudes, (tensors,). Both None: nothing.
    """

    begin: Callable[[int], Any]
    control: Callable[[Any, Any, jax.Array], tuple[Any, Any, Any]]


NO_CONTROL = Controller(lambda count: (), lambda theta, memory, tensors: (memory, None, None))


def averaging(decays: Sequence[float]) -> Memory:
    """Gradient, weight, and averages of the gradient."""

    def begin(w: jax.Array) -> jax.Array:
        return jnp.zeros((*w.shape, len(decays)), wide(w.dtype))

    def see(old: jax.Array, g: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        new = features.averages(old, g, decays)
        return jnp.concatenate([g[..., None], w[..., None], new], axis=-1), new

    return Memory(begin, see)


def transform_of(
    memory: Memory,
    controller: Controller,
    times: Sequence[float],
    step: float,
    magnitude: float,
) -> Callable[[Any], optax.GradientTransformation]:
    """From theta = {"layers": ..., perhaps the controller's} to the optax transformation."""

    def transform(theta: Any) -> optax.GradientTransformation:
        def init(params: Any) -> PerWeightState:
            leaves = jax.tree.leaves(params)
            of_tensors = controller.begin(len(leaves))
            return PerWeightState(jnp.int32(0), [memory.begin(w) for w in leaves], of_tensors)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            if params is None:
                raise ValueError(
                    "a learned optimizer looks at the weights: call update(grads, state, params)."
                )
            grads, structure = jax.tree.flatten(updates)
            pairs = list(zip(grads, structure.flatten_up_to(params), strict=True))
            seen = [
                memory.see(old, g.astype(wide(w.dtype)), w.astype(wide(w.dtype)))
                for old, (g, w) in zip(state.memory, pairs, strict=True)
            ]
            time = features.time(state.count, times, jnp.float32)
            tensors = jnp.stack([features.of_tensor(x, time) for x, _ in seen])
            of_tensors, context, scale = controller.control(theta, state.controller, tensors)

            rows = jnp.concatenate([features.normalised(x) for x, _ in seen])
            which = np.repeat(np.arange(len(grads)), [g.size for g in grads])
            out = _network(theta["layers"], rows, time, None if context is None else context[which])
            log = out[:, 1] if scale is None else out[:, 1] + scale[which]
            moves = -step * out[:, 0] * jnp.exp(magnitude * log)
            parts = jnp.split(moves, list(itertools.accumulate(g.size for g in grads))[:-1])
            moves = [p.reshape(g.shape).astype(g.dtype) for p, g in zip(parts, grads, strict=True)]
            new = PerWeightState(state.count + 1, [kept for _, kept in seen], of_tensors)
            return structure.unflatten(moves), new

        return optax.GradientTransformation(init, update)

    return transform


def _network(layers: list[Any], rows: jax.Array, time: jax.Array, context: Any) -> jax.Array:
    """The MLP on all rows; the time, which all share, goes through its part of the product once."""
    first, *others = layers
    own = rows.shape[-1]
    shared = time @ first["kernel"][own:]
    layers = [{**first, "kernel": first["kernel"][:own]}, *others]
    return networks.apply_layers(layers, rows, shared if context is None else shared + context)


def check_hidden(hidden: Sequence[int]) -> None:
    """Refuses a network without hidden units."""
    if not hidden or any(units < 1 for units in hidden):
        raise ValueError(f"`hidden` must be units of at least one layer; got {tuple(hidden)}.")
