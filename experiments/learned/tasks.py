"""Families of small training tasks, each drawn anew in every episode.

A loss is divided by the logarithm of the number of classes, so that a guess has 1 in every family.
Everything that makes a task is data: tasks of a family run side by side in one program. Meta-
training, meta-validation and tests draw from different images and texts.
"""

import argparse
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments.problems import data
from experiments.problems.text_lstm import VOCABULARY, encode
from unrollgrad.learned_optimizers import Architecture
from unrollgrad.learned_optimizers.networks import init_layers
from unrollgrad.types import Key

CLASSES, PIXELS = 10, 64

CEILING = 1.5
"""Step losses of meta-training are cut here: a guess has 1, and what diverges, to NaN too, is all
the same."""

Part = Literal["training", "validation", "test"]
"""Of the data: for meta-training, for meta-validation, for ``evaluate_optimizer``."""


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
    training loss, at no cost of its own. It is cut at ``CEILING``, and is ``CEILING`` where it is
    NaN: evolution strategies see what a perturbation has destroyed. (Derivatives are NaN there.)
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
        return Training(task, params, opt_state), jnp.where(loss < CEILING, loss, CEILING)

    return ug.UnrolledProblem(init, step, horizon)


def train(
    problem: ug.UnrolledProblem, key: Key, theta: Any, state: Training, first: Any, count: int
) -> tuple[Training, jax.Array]:
    """``count`` inner steps from ``first`` on: the state after them, and the mean step loss."""

    def step(state, t):
        return problem.step(jax.random.fold_in(key, t), theta, state, t)

    state, losses = jax.lax.scan(step, state, first + jnp.arange(count))
    return state, losses.mean()


def mlps(
    *, most_hidden: int = 32, num_rows: int = 256, batch_size: int = 16, part: Part = "training"
) -> Family:
    """MLPs with one hidden layer, on real and on made-up images.

    Drawn are: digits of scikit-learn, or ten smooth random patterns under noise; which images; the
    number of hidden units, from half of ``most_hidden`` to all of them; ReLU, tanh or GELU. Units
    that are left out are masked: their weights have no gradient, and enter a tensor's root mean
    square as zeros.

    Args:
        most_hidden: Units.
        num_rows: Images of a task, all different.
        batch_size: Of a step.
        part: Of the data.
    """
    corpus = _images(part)

    def draw(key):
        keys = jax.random.split(key, 3)
        return {
            **_draw_images(corpus, keys[0], num_rows),
            "hidden": jax.random.randint(keys[1], (), most_hidden // 2, most_hidden + 1),
            "activation": jax.random.randint(keys[2], (), 0, 3),
        }

    def init(key, task):
        params = init_layers(key, (PIXELS, most_hidden, CLASSES))
        params[1]["kernel"] *= jnp.sqrt(most_hidden / task["hidden"])
        return params

    def loss(params, task, rows):
        x, y = _look(corpus, task, rows)
        x = x @ params[0]["kernel"] + params[0]["bias"]
        kinds = jnp.stack([jax.nn.relu(x), jnp.tanh(x), jax.nn.gelu(x)])
        x = jnp.where(jnp.arange(most_hidden) < task["hidden"], kinds[task["activation"]], 0)
        return _cross_entropy(x @ params[1]["kernel"] + params[1]["bias"], y)

    return _on_rows(draw, init, loss, num_rows, batch_size)


def conv_nets(
    *, channels: int = 8, num_rows: int = 256, batch_size: int = 16, part: Part = "training"
) -> Family:
    """Two convolutions (3x3, stride 2, ReLU) and a linear layer, on the images of ``mlps``.

    Args:
        channels: Of the first convolution; the second has twice as many.
        num_rows: As in ``mlps``.
        batch_size: As in ``mlps``.
        part: As in ``mlps``.
    """
    corpus = _images(part)
    sizes = [(9, channels), (9 * channels, 2 * channels), (4 * 2 * channels, CLASSES)]

    def draw(key):
        return _draw_images(corpus, key, num_rows)

    def init(key, task):
        keys = jax.random.split(key, len(sizes))
        return [init_layers(k, size)[0] for k, size in zip(keys, sizes, strict=True)]

    def loss(params, task, rows):
        x, y = _look(corpus, task, rows)
        x = x.reshape(-1, 8, 8, 1)
        for layer in params[:2]:
            x = jax.nn.relu(_patches(x) @ layer["kernel"] + layer["bias"])
        return _cross_entropy(x.reshape(len(x), -1) @ params[2]["kernel"] + params[2]["bias"], y)

    return _on_rows(draw, init, loss, num_rows, batch_size)


def lstms(
    *,
    hidden: int = 16,
    length: int = 16,
    batch_size: int = 8,
    stretch: int = 4096,
    part: Part = "training",
) -> Family:
    """LSTMs that predict the next character of a text.

    Drawn is the stretch of the text, the source of the standard library's ``argparse``: its first
    three quarters are for meta-training, an eighth each for meta-validation and tests.

    Args:
        hidden: Units, of the embedding too.
        length: Characters that are read from each place.
        batch_size: Places of a step.
        stretch: Characters of a task.
        part: Of the text.
    """
    text = encode(inspect.getsource(argparse))
    begin, end = {"training": (0, 6), "validation": (6, 7), "test": (7, 8)}[part]
    symbols = jnp.asarray(text[begin * len(text) // 8 : end * len(text) // 8])
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
"""By name; all take ``part``."""


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


class _Images(NamedTuple):
    """Images of digits, and what made-up ones are made of."""

    digits: np.ndarray
    labels: np.ndarray
    noise: np.ndarray
    noise_labels: np.ndarray


@functools.cache
def _images(part: Part) -> _Images:
    """Of the 597 digits for validation half are for meta-validation."""
    images = data.load("digits")
    half = len(images.validation.labels) // 2
    digits, labels = {
        "training": images.train,
        "validation": data.Split(*(x[:half] for x in images.validation)),
        "test": data.Split(*(x[half:] for x in images.validation)),
    }[part]
    rng = np.random.default_rng(len(digits))
    noise = rng.normal(scale=0.8, size=digits.shape).astype(np.float32)
    return _Images(digits, labels, noise, rng.integers(CLASSES, size=len(labels), dtype=np.int32))


def _draw_images(corpus: _Images, key: Key, num_rows: int) -> dict[str, jax.Array]:
    """Which corpus, which of its images, and the patterns of the made-up classes."""
    keys = jax.random.split(key, 3)
    near = np.exp(-0.5 * (np.subtract.outer(np.arange(8), np.arange(8)) / 1.5) ** 2)
    near = np.float32(near / np.linalg.norm(near, axis=0))
    patterns = near.T @ jax.random.normal(keys[2], (CLASSES, 8, 8)) @ near
    return {
        "made_up": jax.random.bernoulli(keys[0]),
        "rows": jax.random.permutation(keys[1], len(corpus.labels))[:num_rows],
        "patterns": 0.35 * patterns.reshape(CLASSES, PIXELS),
    }


def _look(corpus: _Images, task: dict[str, jax.Array], rows: jax.Array) -> tuple[Any, Any]:
    """Some of a task's images and their labels."""
    rows = task["rows"][rows]
    digits, labels, noise, noise_labels = (jnp.asarray(x)[rows] for x in corpus)
    images = jnp.where(task["made_up"], task["patterns"][noise_labels] + noise, digits)
    return images, jnp.where(task["made_up"], noise_labels, labels)
