"""Families of small training tasks; every episode draws a new task.

A loss is divided by the logarithm of the number of classes, so that a uniform prediction has loss 1
in every family. A task is described by arrays, so tasks of one family run side by side in one
program. Meta-training, meta-validation and tests draw from different images and texts.
"""

import argparse
import functools
import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments.problems import data
from experiments.problems.text_lstm import VOCABULARY, encode
from unrollgrad.learned_optimizers import Architecture
from unrollgrad.learned_optimizers.networks import init_layers
from unrollgrad.types import Key, Theta

CLASSES, PIXELS = 10, 64

CEILING = 1.5
"""Cap on the step losses of meta-training, also for NaN; a uniform prediction has loss 1."""

Part = Literal["training", "validation", "test"]
"""The part of the data: for meta-training, meta-validation or ``evaluate_optimizer``."""

Task = dict[str, jax.Array]
"""The arrays that describe one task."""


class Family(NamedTuple):
    """Tasks of one kind.

    Attributes:
        draw: ``draw(key) -> task`` draws the arrays that describe a task.
        init: ``init(key, task) -> params`` draws initial weights.
        loss: ``loss(params, task, key)`` is the normalised loss on a batch drawn from the key.
        whole: ``whole(params, task)`` is the normalised loss on all training data of the task.
    """

    draw: Callable[[Key], Task]
    init: Callable[[Key, Task], optax.Params]
    loss: Callable[[optax.Params, Task, Key], jax.Array]
    whole: Callable[[optax.Params, Task], jax.Array]


class Training(NamedTuple):
    """The inner state.

    Attributes:
        task: The task of this episode.
        params: The weights that are trained.
        opt_state: The state of the learned optimizer.
    """

    task: Task
    params: optax.Params
    opt_state: optax.OptState


def problem(
    family: Family, architecture: Architecture, horizon: int | Callable[[Key], chex.Numeric]
) -> ug.UnrolledProblem:
    """Training on tasks of a family; theta holds the parameters of the learned optimizer.

    The loss of a step is measured on its fresh batch at the weights before the update, which costs
    nothing extra. It is capped at ``CEILING``, also if it is NaN, so that evolution strategies see
    a high loss where a perturbation makes training diverge. (Derivatives of a NaN loss are NaN.)
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
    problem: ug.UnrolledProblem,
    key: Key,
    theta: Theta,
    state: Training,
    first: chex.Numeric,
    count: int,
) -> tuple[Training, jax.Array]:
    """Takes ``count`` inner steps from step ``first``; returns the state and the mean step loss."""

    def step(state, t):
        return problem.step(jax.random.fold_in(key, t), theta, state, t)

    state, losses = jax.lax.scan(step, state, first + jnp.arange(count))
    return state, losses.mean()


def mlps(
    *, most_hidden: int = 32, num_rows: int = 256, batch_size: int = 16, part: Part = "training"
) -> Family:
    """MLPs with one hidden layer, on real and on made-up images.

    A task draws the corpus (scikit-learn's digits, or ten smooth random patterns with noise), its
    images, the number of hidden units (``most_hidden / 2`` to ``most_hidden``) and the activation
    (ReLU, tanh or GELU). The other units are masked: the gradient of their weights is zero, and
    these zeros count in the root mean square of a tensor.

    Args:
        most_hidden: The largest number of hidden units.
        num_rows: Images of a task, all different.
        batch_size: Images per step.
        part: The part of the data.
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
        channels: Channels of the first convolution; the second has twice as many.
        num_rows: Images of a task, all different.
        batch_size: Images per step.
        part: The part of the data.
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

    A task draws a stretch of the text, the source of the standard library's ``argparse``. The first
    three quarters of it are for meta-training, an eighth each for meta-validation and tests.

    Args:
        hidden: Hidden units, also the size of the embedding.
        length: Characters that are read from each position.
        batch_size: Positions per step.
        stretch: Characters of a task.
        part: The part of the text.
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
"""The families by name; each factory takes ``part``."""


def _on_rows(
    draw: Callable[[Key], Task],
    init: Callable[..., optax.Params],
    loss: Callable[..., jax.Array],
    num_rows: int,
    batch_size: int,
) -> Family:
    """The family whose ``loss(params, task, rows)`` uses random rows of a task, or all rows."""

    def on_batch(params, task, key):
        return loss(params, task, jax.random.randint(key, (batch_size,), 0, num_rows))

    return Family(
        draw, init, on_batch, lambda params, task: loss(params, task, jnp.arange(num_rows))
    )


def _patches(x: jax.Array) -> jax.Array:
    """3x3 patches at every second position, so that one matrix product computes the convolution.

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
    """Images of digits, and the noise and labels of the made-up images."""

    digits: np.ndarray
    labels: np.ndarray
    noise: np.ndarray
    noise_labels: np.ndarray


@functools.cache
def _images(part: Part) -> _Images:
    """Half of the 597 validation digits are for meta-validation, the other half for tests."""
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


def _draw_images(corpus: _Images, key: Key, num_rows: int) -> Task:
    """Draws the corpus, its images and the patterns of the made-up classes."""
    keys = jax.random.split(key, 3)
    near = np.exp(-0.5 * (np.subtract.outer(np.arange(8), np.arange(8)) / 1.5) ** 2)
    near = np.float32(near / np.linalg.norm(near, axis=0))
    patterns = near.T @ jax.random.normal(keys[2], (CLASSES, 8, 8)) @ near
    return {
        "made_up": jax.random.bernoulli(keys[0]),
        "rows": jax.random.permutation(keys[1], len(corpus.labels))[:num_rows],
        "patterns": 0.35 * patterns.reshape(CLASSES, PIXELS),
    }


def _look(corpus: _Images, task: Task, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The task's images and labels in these rows."""
    rows = task["rows"][rows]
    digits, labels, noise, noise_labels = (jnp.asarray(x)[rows] for x in corpus)
    images = jnp.where(task["made_up"], task["patterns"][noise_labels] + noise, digits)
    return images, jnp.where(task["made_up"], noise_labels, labels)
