"""Small networks as trees of arrays, without a library: saved files must load with jax alone."""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from unrollgrad.types import Key, Numeric

__all__ = ["Layer", "apply_gru", "apply_layers", "init_gru", "init_layers"]

Layer = dict[str, jax.Array]
"""The weights of one layer, "kernel" and "bias"."""


def init_layers(key: Key, sizes: Sequence[int], last: float = 1.0) -> list[Layer]:
    """Dense layers; kernels have variance 1 / inputs, and ``last`` multiplies the last kernel."""
    normal = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    layers = [
        {"kernel": normal(k, shape, jnp.float32), "bias": jnp.zeros(shape[1], jnp.float32)}
        for k, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]
    layers[-1]["kernel"] *= last
    return layers


def apply_layers(layers: Sequence[Layer], x: jax.Array, context: Numeric = 0.0) -> jax.Array:
    """Applies dense layers with ReLUs between them; ``context`` is added to the first output."""
    for i, layer in enumerate(layers):
        x = (x if i == 0 else jax.nn.relu(x)) @ layer["kernel"] + layer["bias"]
        x = x + context if i == 0 else x
    return x


def init_gru(key: Key, inputs: int, units: int) -> Layer:
    """A gated recurrent unit; one kernel multiplies the input and the memory."""
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs + units, 3 * units), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(3 * units, jnp.float32)}


def apply_gru(gru: Layer, x: jax.Array, memory: jax.Array) -> jax.Array:
    """The next memory, (..., units)."""
    inputs = x.shape[-1]
    read = x @ gru["kernel"][:inputs] + gru["bias"]
    kept = memory @ gru["kernel"][inputs:]
    (z_x, r_x, n_x), (z_h, r_h, n_h) = (jnp.split(a, 3, axis=-1) for a in (read, kept))
    update, reset = jax.nn.sigmoid(z_x + z_h), jax.nn.sigmoid(r_x + r_h)
    return (1 - update) * memory + update * jnp.tanh(n_x + reset * n_h)
