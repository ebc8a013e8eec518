"""Small networks as trees of arrays, without a library: what is saved must load with jax alone."""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from unrollgrad.types import Key, Theta


def init_layers(key: Key, sizes: Sequence[int], last: float = 1.0) -> list[Theta]:
    """Dense layers: kernels of variance 1 / inputs (``last`` times that size in the last)."""
    normal = jax.nn.initializers.lecun_normal()
    layers = [
        {"kernel": normal(k, shape, jnp.float32), "bias": jnp.zeros(shape[1], jnp.float32)}
        for k, shape in zip(
            jax.random.split(key, len(sizes) - 1), itertools.pairwise(sizes), strict=True
        )
    ]
    layers[-1]["kernel"] *= last
    return layers


def apply_layers(layers: Sequence[Theta], x: jax.Array, context: Any = 0.0) -> jax.Array:
    """ReLUs between the layers; ``context`` is added to what goes into the first of them."""
    for i, layer in enumerate(layers):
        x = (x if i == 0 else jax.nn.relu(x)) @ layer["kernel"] + layer["bias"]
        x = x + context if i == 0 else x
    return x


def init_gru(key: Key, inputs: int, units: int) -> Theta:
    """A gated recurrent unit: what is read and what is remembered go through one product."""
    kernel = jax.nn.initializers.lecun_normal()(key, (inputs + units, 3 * units), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(3 * units, jnp.float32)}


def apply_gru(gru: Theta, x: jax.Array, memory: jax.Array) -> jax.Array:
    """The next memory, (..., units)."""
    inputs = x.shape[-1]
    read = x @ gru["kernel"][:inputs] + gru["bias"]
    kept = memory @ gru["kernel"][inputs:]
    (z_x, r_x, n_x), (z_h, r_h, n_h) = (jnp.split(a, 3, axis=-1) for a in (read, kept))
    update, reset = jax.nn.sigmoid(z_x + z_h), jax.nn.sigmoid(r_x + r_h)
    return (1 - update) * memory + update * jnp.tanh(n_x + reset * n_h)
