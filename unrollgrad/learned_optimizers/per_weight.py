"""How learned optimizers run that look at one weight at a time: all weights in one product.

Every weight's features go through the same small MLP, whose two outputs d and m move the weight by
``-step * d * exp(magnitude * m)``.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from unrollgrad._core.dtypes import wide
from unrollgrad.learned_optimizers import features, networks


class PerWeightState(NamedTuple):
    """The state of these optimizers.

    Attributes:
        count: int32, steps so far.
        memory: What is remembered of each tensor, a tree like the weights.
        controller: The recurrent network's memory, (tensors, units); () where there is none.
    """

    count: jax.Array
    memory: Any
    controller: Any


class Memory(NamedTuple):
    """What is remembered of a tensor.

    Attributes:
        begin: ``begin(zeros)``, from zeros like the weights.
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
            magnitudes, (tensors,).
    """

    begin: Callable[[int], Any]
    control: Callable[[Any, Any, jax.Array], tuple[Any, jax.Array, jax.Array]]


def averaging(decays: Sequence[float]) -> Memory:
    """Gradient, weight, and averages of the gradient."""

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
) -> Callable[[Any], optax.GradientTransformation]:
    """From theta = {"layers": ..., perhaps the controller's} to the optax transformation.

    Leaves without numbers, and those whose gradient is None, stay as they are.
    """

    def init(params: Any) -> PerWeightState:
        leaves, structure = jax.tree.flatten(params)
        for path, w in jax.tree_util.tree_leaves_with_path(params):
            if jnp.iscomplexobj(w):
                raise TypeError(
                    f"a learned optimizer updates real weights; params{jax.tree_util.keystr(path)} "
                    f"is {jnp.result_type(w)}. Train the others (optax.masked), or hold its real "
                    "and imaginary parts as two leaves."
                )
        zeros = [jnp.zeros_like(w, wide(jnp.result_type(w))) for w in leaves]
        of_tensors = () if controller is None else controller.begin(len(leaves))
        remembered = structure.unflatten(memory.begin(x) for x in zeros)
        return PerWeightState(jnp.zeros((), jnp.int32), remembered, of_tensors)

    def transform(theta: Any) -> optax.GradientTransformation:
        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            if params is None:
                raise ValueError(
                    "a learned optimizer looks at the weights: call update(grads, state, params)."
                )
            weights, structure = jax.tree.flatten(params)
            moves = structure.flatten_up_to(updates)
            remembered = structure.flatten_up_to(state.memory)
            active = [i for i, g in enumerate(moves) if g is not None and jnp.size(g)]
            of_tensors = state.controller
            if active:
                seen = []
                for i in active:
                    g, w = (
                        jnp.asarray(x, wide(jnp.result_type(x))) for x in (moves[i], weights[i])
                    )
                    found, remembered[i] = memory.see(remembered[i], g, w)
                    seen.append(found)
                time = features.time(state.count, times, jnp.float32)
                context = log_magnitudes = None
                if controller is not None:
                    tensors = jnp.stack([features.of_tensor(x, time) for x in seen])
                    own = of_tensors[jnp.array(active)]
                    own, context, log_magnitudes = controller.control(theta, own, tensors)
                    of_tensors = of_tensors.at[jnp.array(active)].set(own.astype(of_tensors.dtype))
                both = _through(theta["layers"], seen, time, context)
                for j, (i, (d, m)) in enumerate(zip(active, both, strict=True)):
                    m = m if log_magnitudes is None else m + log_magnitudes[j]
                    move = -step * d * jnp.exp(magnitude * m)
                    g = jnp.asarray(moves[i])
                    moves[i] = move.reshape(g.shape).astype(g.dtype)
            new = PerWeightState(state.count + 1, structure.unflatten(remembered), of_tensors)
            return structure.unflatten(moves), new

        return optax.GradientTransformation(init, update)

    return transform


def _through(
    layers: list[Any], seen: list[jax.Array], time: jax.Array, context: Any
) -> list[tuple[jax.Array, jax.Array]]:
    """Both outputs of the MLP for every weight of every tensor, in one product.

    The time, which all share, goes through its part of the first layer once.
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
    """Refuses a network without hidden units."""
    if not hidden or any(units < 1 for units in hidden):
        raise ValueError(f"`hidden` must be units of at least one layer; got {tuple(hidden)}.")
