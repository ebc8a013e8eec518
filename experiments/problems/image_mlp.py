"""SGD with momentum trains an MLP on images; theta is its learning rate."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.problems.data import Images, Split

CLASSES = 10


def init_params(key: jax.Array, sizes: Sequence[int]) -> list[tuple[jax.Array, jax.Array]]:
    """Draws the layers between ``sizes``: uniform weights of variance 2 / inputs (He), zero biases.

    All weights are cut from one draw, because each draw takes a second to compile on a CPU.
    """
    shapes = list(itertools.pairwise(sizes))
    ends = np.cumsum([m * n for m, n in shapes])
    drawn = jnp.split(jax.random.uniform(key, (ends[-1],), minval=-1), ends[:-1])
    return [
        (part.reshape(m, n) * np.sqrt(6 / m), jnp.zeros(n))
        for part, (m, n) in zip(drawn, shapes, strict=True)
    ]


def logits(params: list[tuple[jax.Array, jax.Array]], images: jax.Array) -> jax.Array:
    """The logits of a batch of images; there are ReLUs between the layers."""
    *hidden, (weights, bias) = params
    for w, b in hidden:
        images = jax.nn.relu(images @ w + b)
    return images @ weights + bias


def cross_entropy(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean cross-entropy over a batch, in nats."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()


def accuracy(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The fraction of a batch that is classified correctly, a step function of the weights."""
    images, labels = batch
    return jnp.mean(jnp.argmax(logits(params, images), axis=-1) == labels)


def sampler(split: Split, batch_size: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns ``draw(key) -> batch``, which draws with replacement."""
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)

    def draw(key):
        rows = jnp.int32(jax.random.uniform(key, (batch_size,)) * len(labels))
        return images[rows], labels[rows]

    return draw


def task(images: Images, hidden: Sequence[int], batch_size: int) -> dict[str, Any]:
    """The arguments of ``training_problem`` that describe the task.

    Args:
        images: The data.
        hidden: Units of the hidden layers.
        batch_size: Images in a batch.

    Returns:
        ``loss``, ``init_params`` and ``sample_batch``.
    """
    sizes = (images.train.images.shape[1], *hidden, CLASSES)
    return {
        "loss": lambda theta, params, batch, key: cross_entropy(params, batch),
        "init_params": lambda key: init_params(key, sizes),
        "sample_batch": sampler(images.train, batch_size),
    }


def decaying_sgd(theta: jax.Array, t: Any, constant: float) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and learning rate e^theta[0] / (1 + t / constant)^(e^theta[1])."""
    rate = jnp.exp(theta[0] - jnp.exp(theta[1]) * jnp.log1p(t / constant))
    return optax.sgd(rate, momentum=0.9)
