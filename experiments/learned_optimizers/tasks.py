"""Families of small training tasks, each drawn anew in every episode.

A loss is divided by the logarithm of the number of classes, so that a guess has 1 in every family.
Everything that makes a task is data: tasks of a family run side by side in one program.
"""

import argparse
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments import data
from experiments.problems.text_lstm import VOCABULARY, encode
from unrollgrad.learned_optimizers import Architecture
from unrollgrad.learned_optimizers.networks import init_layers
from unrollgrad.types import Key

CLASSES = 10

CEILING = 1.5
"""Step losses of meta-training are cut here: a guess has 1, and what diverges is all the same."""


class Family(NamedTuple):
    """Tasks of one kind.

    Attributes:
        draw: ``draw(key) -> task``, arrays that tell it from the others.
        init: ``init(key, task) -> params``, fresh weights.
        loss: ``loss(params, task, key)``, normalised, on a batch that the key draws.
        whole: ``whole(params, task)``, normalised, on all that the task is trained on.
    """

    draw: Callable[[Key], Any]
    init: Callable[[Key, Any], Any]
    loss: Callable[[Any, Any, Key], jax.Array]
    whole: Callable[[Any, Any], jax.Array]


class Training(NamedTuple):
    """The inner state.

    Attributes:
        task: What is learned.
        params: The weights that learn it.
        opt_state: The optimizer's.
    """

    task: Any
    params: Any
    opt_state: Any


def problem(family: Family, architecture: Architecture, horizon: Any) -> ug.UnrolledProblem:
    """Training on tasks of a family; theta is the optimizer.

    A step's loss is that of its batch, which is fresh, at the weights before the update: the
    training loss, at no cost of its own. It is cut at ``CEILING``.
    """

    def init(key, theta):
        key_task, key_params = jax.random.split(key)
        task = family.draw(key_task)
        params = family.init(key_params, task)
        return Training(task, params, architecture.transform(theta).init(params))

    def step(key, theta, state, t):
        task, params, opt_state = state
        loss, grad = jax.value_and_grad(family.loss)(params, task, key)
        updates, opt_state = architecture.transform(theta).update(grad, opt_state, params)
        params = optax.apply_updates(params, updates)
        return Training(task, params, opt_state), jnp.minimum(loss, CEILING)

    return ug.UnrolledProblem(init, step, horizon)


def mlps(
    *, most_hidden: int = 32, num_rows: int = 512, batch_size: int = 16, held_out: bool = False
) -> Family:
    """MLPs with one hidden layer, on real and on made-up images.

    Drawn are: digits of scikit-learn or made-up classes; which ``num_rows`` of the images; the
    number of hidden units, from a quarter of ``most_hidden`` to all of them (the others are masked,
    and their weights get no gradient); ReLU, tanh or GELU.

    Args:
        most_hidden: Units.
        num_rows: Images of a task.
        batch_size: Of a step.
        held_out: Draw from images that no other task has.
    """
    images, labels = _images(held_out)

    def draw(key):
        keys = jax.random.split(key, 4)
        return {
            "corpus": jax.random.randint(keys[0], (), 0, len(images)),
            "rows": jax.random.randint(keys[1], (num_rows,), 0, images.shape[1]),
            "hidden": jax.random.randint(keys[2], (), most_hidden // 4, most_hidden + 1),
            "activation": jax.random.randint(keys[3], (), 0, 3),
        }

    def init(key, task):
        return init_layers(key, (images.shape[-1], most_hidden, CLASSES))

    def loss(params, task, rows):
        rows = task["rows"][rows]
        x, y = images[task["corpus"], rows], labels[task["corpus"], rows]
        x = x @ params[0]["kernel"] + params[0]["bias"]
        kinds = jnp.stack([jax.nn.relu(x), jnp.tanh(x), jax.nn.gelu(x)])
        x = jnp.where(jnp.arange(most_hidden) < task["hidden"], kinds[task["activation"]], 0)
        return _cross_entropy(x @ params[1]["kernel"] + params[1]["bias"], y)

    return _on_rows(draw, init, loss, num_rows, batch_size)


def conv_nets(
    *, channels: int = 8, num_rows: int = 512, batch_size: int = 16, held_out: bool = False
) -> Family:
    """Two convolutions (3x3, stride 2, ReLU) and a linear layer, on the images of ``mlps``.

    Drawn are the corpus and the rows. The arguments are those of ``mlps``; ``channels`` are those
    of the first convolution, the second has twice as many.
    """
    images, labels = _images(held_out)
    sizes = [(9, channels), (9 * channels, 2 * channels), (4 * 2 * channels, CLASSES)]

    def draw(key):
        keys = jax.random.split(key)
        return {
            "corpus": jax.random.randint(keys[0], (), 0, len(images)),
            "rows": jax.random.randint(keys[1], (num_rows,), 0, images.shape[1]),
        }

    def init(key, task):
        keys = jax.random.split(key, len(sizes))
        return [init_layers(k, size)[0] for k, size in zip(keys, sizes, strict=True)]

    def loss(params, task, rows):
        rows = task["rows"][rows]
        x = images[task["corpus"], rows].reshape(-1, 8, 8, 1)
        for layer in params[:2]:
            x = jax.nn.relu(_patches(x) @ layer["kernel"] + layer["bias"])
        x = x.reshape(len(x), -1) @ params[2]["kernel"] + params[2]["bias"]
        return _cross_entropy(x, labels[task["corpus"], rows])

    return _on_rows(draw, init, loss, num_rows, batch_size)


def lstms(
    *,
    hidden: int = 16,
    length: int = 16,
    batch_size: int = 8,
    stretch: int = 4096,
    held_out: bool = False,
) -> Family:
    """LSTMs that predict the next character of a text.

    Drawn is the stretch of the text, the source of the standard library's ``argparse``, of which
    the last quarter is held out.

    Args:
        hidden: Units, of the embedding too.
        length: Characters that are read from each place.
        batch_size: Places of a step.
        stretch: Characters of a task.
        held_out: Draw from text that no other task has.
    """
    text = encode(inspect.getsource(argparse))
    cut = 3 * len(text) // 4
    symbols = jnp.asarray(text[cut:] if held_out else text[:cut])
    num_places = stretch - length - 1

    def draw(key):
        return {"begin": jax.random.randint(key, (), 0, len(symbols) - stretch)}

    def init(key, task):
        keys = jax.random.split(key, 3)
        embedding = 0.3 * jax.random.normal(keys[0], (VOCABULARY, hidden))
        cell, out = (
            init_layers(keys[1], (2 * hidden, 4 * hidden)),
            init_layers(keys[2], (hidden, VOCABULARY)),
        )
        return {"embedding": embedding, "cell": cell[0], "out": out[0]}

    def loss(params, task, places):
        read = symbols[task["begin"] + places[:, None] + jnp.arange(length + 1)].T

        def step(carry, symbol):
            memory, h = carry
            both = jnp.concatenate([params["embedding"][symbol], h], axis=-1)
            i, f, g, o = jnp.split(both @ params["cell"]["kernel"] + params["cell"]["bias"], 4, -1)
            memory = jax.nn.sigmoid(f + 1) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(memory)
            return (memory, h), h

        start = jnp.zeros((2, read.shape[1], hidden))
        _, hs = jax.lax.scan(step, (start[0], start[1]), read[:-1])
        return _cross_entropy(hs @ params["out"]["kernel"] + params["out"]["bias"], read[1:])

    def whole(params, task):
        return loss(params, task, jnp.arange(0, num_places, length))

    def on_batch(params, task, key):
        return loss(params, task, jax.random.randint(key, (batch_size,), 0, num_places))

    return Family(draw, init, on_batch, whole)


FAMILIES = {"mlp": mlps, "conv": conv_nets, "lstm": lstms}
"""By name; all take ``held_out``."""


def _on_rows(
    draw: Callable[..., Any],
    init: Callable[..., Any],
    loss: Callable[..., jax.Array],
    num_rows: int,
    batch_size: int,
) -> Family:
    """``loss(params, task, rows)`` on random rows of a task, and on all of them."""

    def on_batch(params, task, key):
        return loss(params, task, jax.random.randint(key, (batch_size,), 0, num_rows))

    return Family(
        draw, init, on_batch, lambda params, task: loss(params, task, jnp.arange(num_rows))
    )


def _patches(x: jax.Array) -> jax.Array:
    """3x3 patches at every second place, by slices: one product then makes a convolution of them.

    Convolutions whose kernels differ between particles are slow on a CPU.
    """
    n, side = len(x), x.shape[1] // 2
    x = jnp.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    parts = [x[:, i : i + 2 * side : 2, j : j + 2 * side : 2] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, axis=-1).reshape(n, side, side, -1)


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean() / np.log(logits.shape[-1])


@functools.lru_cache(maxsize=2)
def _images(held_out: bool) -> tuple[jax.Array, jax.Array]:
    """Digits, and as many made-up images: (2, images, 64) and (2, images).

    The made-up ones are smooth random patterns, one for each class, under noise.
    """
    real = data.load("digits").validation if held_out else data.load("digits").train
    rng = np.random.default_rng(0)
    kernel = np.exp(-0.5 * (np.subtract.outer(np.arange(8), np.arange(8)) / 1.5) ** 2)
    patterns = kernel @ rng.normal(size=(CLASSES, 8, 8)) @ kernel
    patterns *= 0.35 / patterns.std(axis=(1, 2), keepdims=True)
    rng = np.random.default_rng(1 + held_out)
    labels = rng.integers(CLASSES, size=len(real.labels))
    noise = rng.normal(scale=0.8, size=(len(labels), 64))
    made_up = patterns.reshape(CLASSES, 64)[labels] + noise
    images = np.stack([real.images, made_up.astype(np.float32)])
    return jnp.asarray(images), jnp.asarray(np.stack([real.labels, labels.astype(np.int32)]))
