"""An MLP that learns images by SGD with momentum, at a rate that theta says."""

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
    """Weights and biases of the layers between ``sizes``: uniform, with He's variance 2 / inputs.

    All are cut from one draw: every draw takes a CPU a second to compile.
    """
    shapes = list(itertools.pairwise(sizes))
    ends = np.cumsum([m * n for m, n in shapes])
    drawn = jnp.split(jax.random.uniform(key, (ends[-1],), minval=-1), ends[:-1])
    return [
        (part.reshape(m, n) * np.sqrt(6 / m), jnp.zeros(n))
        for part, (m, n) in zip(drawn, shapes, strict=True)
    ]


def logits(params: list[tuple[jax.Array, jax.Array]], images: jax.Array) -> jax.Array:
    """Of a batch of images; ReLUs between the layers."""
    *hidden, (weights, bias) = params
    for w, b in hidden:
        images = jax.nn.relu(images @ w + b)
    return images @ weights + bias


def cross_entropy(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The mean over a batch, in nats."""
    images, labels = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, images), labels).mean()


def accuracy(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """The fraction of a batch that is classified correctly: a step function of the weights."""
    images, labels = batch
    return jnp.mean(jnp.argmax(logits(params, images), axis=-1) == labels)


def sampler(split: Split, batch_size: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """``draw(key) -> batch``, with replacement."""
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)

    def draw(key):
        rows = jnp.int32(jax.random.uniform(key, (batch_size,)) * len(labels))
        return images[rows], labels[rows]

    return draw


def task(images: Images, hidden: Sequence[int], batch_size: int) -> dict[str, Any]:
    """The arguments of ``training_problem`` that say what is learned, in batches for training.

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
    """SGD with momentum 0.9 and the rate e^theta[0] / (1 + t / constant)^(e^theta[1])."""
    rate = jnp.exp(theta[0] - jnp.exp(theta[1]) * jnp.log1p(t / constant))
    return optax.sgd(rate, momentum=0.9)
