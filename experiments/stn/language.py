"""A character-level LSTM with dropout of its outputs, on the standard library's own source."""

import argparse
import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments.problems.text_lstm import VOCABULARY, encode
from experiments.stn.searches import Range
from experiments.stn.training import Task

DROP = "drop output"
"""The only hyperparameter."""

RANGE = Range(0.0, 0.95, False, DROP, (0.05, 0.2, 0.35, 0.5, 0.65))
"""Where the dropout rate may lie, and the fixed rates that are tried."""

START = 0.05
"""The first rate, as in the paper."""


class Sizes(NamedTuple):
    """The network, and the text.

    Attributes:
        hidden: Units of the LSTM.
        embed: Size of the embedding.
        window: Characters that are read from a zero memory.
        batch: Windows in a training batch, and in a validation batch.
        train: Characters of the training text; as many are for validation, and for tests.
    """

    hidden: int
    embed: int
    window: int
    batch: int
    train: int


class Data(NamedTuple):
    """Texts as symbols."""

    train: jax.Array
    validation: jax.Array
    test: jax.Array


def data(sizes: Sizes) -> Data:
    """The first characters of the source of ``argparse``, and those that follow.

    Raises:
        ValueError: If the text is too short for these sizes.
    """
    symbols = encode(inspect.getsource(argparse))
    if len(symbols) < 3 * sizes.train:
        raise ValueError(f"`train`={sizes.train} must be at most {len(symbols) // 3}.")
    cuts = [sizes.train, 2 * sizes.train, 3 * sizes.train]
    return Data(*map(jnp.asarray, np.split(symbols, cuts)[:3]))


def task(sizes: Sizes, rate: float, here: Data) -> Task:
    """The training of the LSTM by Adam."""
    kinds = {DROP: RANGE.constraint()}

    def sample(text, key):
        starts = jax.random.randint(key, (sizes.batch,), 0, len(text) - sizes.window)
        return text[starts[:, None] + jnp.arange(sizes.window + 1)]

    def noisy(theta, params, batch, key):
        hidden = outputs(params, batch[:, :-1])
        keep = 1 - ug.constraints.constrain(kinds, theta)[DROP]
        kept = jax.random.uniform(key, hidden.shape) < keep
        return jnp.where(kept, hidden / keep, 0.0) @ params["out"] + params["bias"]

    def plain(params, windows):
        logits = outputs(params, windows[:, :-1]) @ params["out"] + params["bias"]
        return cross_entropy(logits, windows)

    def whole(text):
        count = (len(text) - 1) // sizes.window
        return text[sizes.window * jnp.arange(count)[:, None] + jnp.arange(sizes.window + 1)]

    return Task(
        loss=ug.stn.SplitLoss(
            noisy, lambda theta, logits, batch, key: cross_entropy(logits, batch)
        ),
        meta_loss=lambda theta, params, key: plain(params, sample(here.validation, key)),
        init_params=functools.partial(_init, sizes),
        sample_batch=functools.partial(sample, here.train),
        optimizer=optax.adam(rate),
        response_optimizer=optax.adam,
        evaluate=lambda p: (plain(p, whole(here.validation)), plain(p, whole(here.test))),
        kinds=kinds,
        start={DROP: START},
    )


def cross_entropy(logits: jax.Array, windows: jax.Array) -> jax.Array:
    """The mean cross-entropy of the next characters, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def outputs(params: Any, symbols: jax.Array) -> jax.Array:
    """The LSTM's outputs, (batch, window, hidden); its memory begins at zero."""
    x = jnp.swapaxes(params["embed"][symbols] @ params["inputs"], 0, 1) + params["gates"]
    zeros = jnp.zeros((symbols.shape[0], params["memory"].shape[0]))

    def step(carry, x):
        hidden, cell = carry
        i, f, g, o = jnp.split(x + hidden @ params["memory"], 4, axis=-1)
        cell = jax.nn.sigmoid(f + 1) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        hidden = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (hidden, cell), hidden

    _, found = jax.lax.scan(step, (zeros, zeros), x)
    return jnp.swapaxes(found, 0, 1)


def _init(sizes: Sizes, key: jax.Array) -> dict[str, jax.Array]:
    shapes = {
        "embed": (VOCABULARY, sizes.embed),
        "inputs": (sizes.embed, 4 * sizes.hidden),
        "memory": (sizes.hidden, 4 * sizes.hidden),
        "out": (sizes.hidden, VOCABULARY),
    }
    drawn = {
        name: jax.random.normal(k, shape) / np.float32(np.sqrt(shape[0] if name != "embed" else 1))
        for k, (name, shape) in zip(jax.random.split(key, 4), shapes.items(), strict=True)
    }
    return {**drawn, "gates": jnp.zeros(4 * sizes.hidden), "bias": jnp.zeros(VOCABULARY)}
