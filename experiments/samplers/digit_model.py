"""A small diffusion model of 8 x 8 digits, a judge of its samples, and measures of these."""

import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.problems import data
from unrollgrad import samplers
from unrollgrad.types import Key

PIXELS = 64
WANTED = 8
"""The digit that the judges are asked for."""
SCHEDULE = samplers.vp()
PERIODS = 2.0 ** np.arange(4)
WIDTH, FAR = 0.7, 4.0
"""The width of the held-out classifier's kernel, and the distance at which it sees no digit."""


class Model(NamedTuple):
    """What all seeds share.

    Attributes:
        weights: The denoiser's weights.
        judge: Weights of the classifier that is a reward.
        images: The images that the denoiser was trained on, shape (n, 64), from -1 to 1.
        labels: Their digits.
        held_out: Images that no training saw, for a classifier of another kind.
        held_out_labels: Their digits.
    """

    weights: Any
    judge: Any
    images: jax.Array
    labels: jax.Array
    held_out: jax.Array
    held_out_labels: jax.Array


def dense(key: Key, sizes: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    """Layers of normal weights, and zeros."""
    return [
        {"w": jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for k, a, b in zip(jax.random.split(key, len(sizes)), sizes, sizes[1:], strict=False)
    ]


def denoiser(weights: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """The noise in x: an MLP whose layers are scaled and shifted by features of the time."""
    angles = jnp.pi * t * PERIODS / 2
    time = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)])
    hidden = x
    *layers, last = weights["layers"]
    for layer, film in zip(layers, weights["film"], strict=True):
        scale, shift = jnp.split(time @ film["w"] + film["b"], 2)
        hidden = jax.nn.silu((hidden @ layer["w"] + layer["b"]) * (1 + scale) + shift)
    return x + hidden @ last["w"] + last["b"]


def class_scores(weights: Any, x: jax.Array) -> jax.Array:
    """A classifier's logarithms of the probabilities of the ten digits."""
    first, last = weights
    hidden = jnp.tanh(x @ first["w"] + first["b"])
    return jax.nn.log_softmax(hidden @ last["w"] + last["b"])


def trained(loss: Callable[[Key, Any], jax.Array], weights: Any, num_steps: int, key: Key) -> Any:
    """The weights after steps of Adam whose rate falls from 0.003 to zero."""
    adam = optax.adam(optax.linear_schedule(3e-3, 0.0, num_steps))

    def step(carry, i):
        weights, state = carry
        grad = jax.grad(loss, 1)(jax.random.fold_in(key, i), weights)
        updates, state = adam.update(grad, state)
        return (optax.apply_updates(weights, updates), state), None

    @jax.jit
    def run(weights):
        return jax.lax.scan(step, (weights, adam.init(weights)), jnp.arange(num_steps))[0][0]

    return run(weights)


@functools.lru_cache(maxsize=2)
def model(hidden: int, num_steps: int, seed: int = 0) -> Model:
    """Trains the denoiser and the judge on scikit-learn's digits.

    The judge is trained with noise of standard deviation 0.3 on the pixels.

    Args:
        hidden: Units in each of the denoiser's three hidden layers.
        num_steps: Steps of the denoiser's training, with batches of 128 images; a tenth as many
            train the judge.
        seed: It draws all weights and batches.
    """
    train, other = data.load("digits")
    images, labels = jnp.asarray(2 * train.images), jnp.asarray(train.labels)
    keys = jax.random.split(jax.random.key(seed), 5)

    def denoising(key, weights):
        for_rows, for_time, for_noise = jax.random.split(key, 3)
        x = images[jax.random.randint(for_rows, (128,), 0, len(images))]
        t = jax.random.uniform(for_time, (128,), minval=1e-3)
        z = jax.random.normal(for_noise, x.shape)
        alpha, sigma = map(jnp.asarray, jax.vmap(SCHEDULE)(t[:, None]))
        noised = alpha * x + sigma * z
        found = jax.vmap(denoiser, (None, 0, 0))(weights, noised, t)
        return jnp.mean((found - z) ** 2)

    def classifying(key, weights):
        for_rows, for_noise = jax.random.split(key)
        rows = jax.random.randint(for_rows, (64,), 0, len(images))
        x = images[rows] + 0.3 * jax.random.normal(for_noise, (64, PIXELS))
        found = class_scores(weights, x)
        return -jnp.mean(jnp.take_along_axis(found, labels[rows][:, None], 1))

    sizes = (PIXELS, hidden, hidden, hidden, PIXELS)
    start = {
        "layers": dense(keys[0], sizes),
        "film": [
            {"w": 0.1 * layer["w"], "b": layer["b"]}
            for k in jax.random.split(keys[1], 3)
            for layer in dense(k, (2 * len(PERIODS), 2 * hidden))
        ],
    }
    weights = trained(denoising, start, num_steps, keys[2])
    first = dense(keys[3], (PIXELS, 64, 10))
    judge = trained(classifying, first, max(num_steps // 10, 1), keys[4])
    held_out = jnp.asarray(2 * other.images), jnp.asarray(other.labels)
    return Model(weights, judge, images, labels, *held_out)


def visible(x: jax.Array) -> jax.Array:
    """The image that can be shown: pixels from -1 to 1. All rewards and measures see it."""
    return jnp.clip(x, -1.0, 1.0)


def held_out_scores(found: Model, x: jax.Array) -> jax.Array:
    """The probability of an eight by a classifier of another kind than the judge.

    A kernel density of each digit's held-out images, and one more class for what is far from all of
    them: at a distance of ``FAR`` from one image "none of them" is as likely as that image.
    """
    kernel = jnp.exp(-_squares(x, found.held_out) / (2 * WIDTH**2))
    eights = kernel @ (found.held_out_labels == WANTED)
    return eights / (jnp.sum(kernel, 1) + jnp.exp(-(FAR**2) / (2 * WIDTH**2)))


def total_variation(x: jax.Array) -> jax.Array:
    """The mean absolute difference of neighbouring pixels."""
    image = x.reshape(8, 8)
    across, down = (jnp.abs(jnp.diff(image, axis=axis)) for axis in (0, 1))
    return (jnp.sum(across) + jnp.sum(down)) / (across.size + down.size)


def zlib_bytes(x: jax.Array) -> jax.Array:
    """The bytes of the image, in 16 grey levels, after zlib: outside JAX, without a gradient."""
    return jax.pure_callback(
        sizes, jax.ShapeDtypeStruct((), jnp.float32), x, vmap_method="expand_dims"
    )


def sizes(x: Any) -> np.ndarray:
    """The bytes of each image of a batch after zlib, shape of x without its last axis."""
    x = np.asarray(x)
    levels = np.clip(np.round((x + 1) * 7.5), 0, 15).astype(np.uint8).reshape(-1, PIXELS)
    found = [len(zlib.compress(image.tobytes(), 9)) for image in levels]
    return np.array(found, np.float32).reshape(x.shape[:-1])


def measures(found: Model, x: jax.Array) -> dict[str, jax.Array]:
    """Two opinions on samples, how far apart they are, and how far from real images."""
    x = visible(x)
    to_data = jnp.sqrt(jnp.min(_squares(x, found.images), axis=1))
    return {
        "judge": jnp.mean(jnp.exp(class_scores(found.judge, x)[:, WANTED])),
        "held_out": jnp.mean(held_out_scores(found, x)),
        "diversity": diversity(x),
        "nearest": jnp.mean(to_data),
        "variation": jnp.mean(jax.vmap(total_variation)(x)),
    }


def diversity(x: jax.Array) -> jax.Array:
    """The mean distance of two different samples."""
    n = len(x)
    return jnp.sum(jnp.sqrt(_squares(x, x))) / (n * (n - 1))


def _squares(x: jax.Array, y: jax.Array) -> jax.Array:
    products = jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1) - 2 * x @ y.T
    return jnp.maximum(products, 0)
