"""Training of small nets on weighted digits, as problems whose theta is a weight per image."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import unrollgrad as ug
from experiments.problems import data

Params = list[tuple[jax.Array, jax.Array]]


class Examples(NamedTuple):
    """Images and labels, with as many leading axes."""

    images: jax.Array
    labels: jax.Array


def digits() -> tuple[Examples, Examples]:
    """The 1200 digits for training, and the 597 others; the same in every call."""
    first, second = (Examples(*map(jnp.asarray, part)) for part in data.load("digits"))
    return first, second


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "tanh": jnp.tanh,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
}


class Recipe(NamedTuple):
    """How a net is trained.

    Attributes:
        net: "mlp": two hidden layers. "conv": two convolutions with average pooling.
        width: Units of a hidden layer, or channels of the last convolution.
        activation: A name in ``ACTIVATIONS``.
        output_scale: A factor of the logits.
        rate: Learning rate of Adam.
        eps_root: Adam's constant inside of the square root.
        batch_size: Images in a batch.
        horizon: Number of steps.
    """

    net: Literal["mlp", "conv"] = "mlp"
    width: int = 32
    activation: str = "gelu"
    output_scale: float = 0.1
    rate: float = 0.01
    eps_root: float = 1e-5
    batch_size: int = 200
    horizon: int = 100


def init_params(recipe: Recipe, key: jax.Array) -> Params:
    """Normal weights of variance 1 / inputs, and zero biases."""
    width = recipe.width
    sizes = [(64, width), (width, width), (width, 10)]
    if recipe.net == "conv":
        sizes = [(9, width // 2), (9 * (width // 2), width), (width, 10)]
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(k, size) / size[0] ** 0.5, jnp.zeros(size[1]))
        for k, size in zip(keys, sizes, strict=True)
    ]


def logits(recipe: Recipe, params: Params, images: jax.Array) -> jax.Array:
    """The logits of images, shape (n, 64)."""
    activation = ACTIVATIONS[recipe.activation]
    *hidden, (weights, bias) = params
    h = images
    if recipe.net == "conv":
        h = images.reshape(-1, 8, 8, 1)
    for w, b in hidden:
        if recipe.net == "mlp":
            h = activation(h @ w + b)
        else:
            h = _halved(activation(_patches(h) @ w + b))
    if recipe.net == "conv":
        h = h.mean((1, 2))
    return recipe.output_scale * (h @ weights + bias)


def _patches(h: jax.Array) -> jax.Array:
    """The 3 x 3 neighbourhoods of all pixels: a convolution is then a product of matrices.

    Batches of kernels would be grouped convolutions, which are slow on CPUs.
    """
    n, rows, columns, channels = h.shape
    wide = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [wide[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
    return jnp.stack(parts, -1).reshape(n, rows, columns, 9 * channels)


def _halved(h: jax.Array) -> jax.Array:
    """Means over squares of 2 x 2 pixels."""
    n, rows, columns, channels = h.shape
    return h.reshape(n, rows // 2, 2, columns // 2, 2, channels).mean((2, 4))


def cross_entropies(recipe: Recipe, params: Params, examples: Examples) -> jax.Array:
    """The cross-entropy of each image, in nats."""
    found = logits(recipe, params, examples.images)
    return optax.softmax_cross_entropy_with_integer_labels(found, examples.labels)


def accuracy(recipe: Recipe, params: Params, examples: Examples) -> jax.Array:
    """The fraction of images that are classified correctly."""
    found = logits(recipe, params, examples.images)
    return jnp.mean(jnp.argmax(found, -1) == examples.labels)


class Run(NamedTuple):
    """What a training run is given besides weights.

    Attributes:
        train: The training images, with a weight each.
        start: The initial weights of the net.
        rows: The images of each batch, shape (horizon, batch_size).
    """

    train: Examples
    start: Params
    rows: jax.Array


def draw_run(recipe: Recipe, train: Examples, key: jax.Array) -> Run:
    """Draws the initial weights, and batches with replacement."""
    key_start, key_rows = jax.random.split(key)
    shape = recipe.horizon, recipe.batch_size
    rows = jax.random.randint(key_rows, shape, 0, len(train.labels))
    return Run(train, init_params(recipe, key_start), rows)


def weighted_training(recipe: Recipe, run: Run) -> ug.UnrolledProblem:
    """Training on images that have weights: theta has one for each training image.

    The loss of a step is the mean over a batch of weight times cross-entropy. Nothing depends on
    the episode's key.
    """
    images, labels = run.train

    def loss(theta, params, rows, key):
        each = cross_entropies(recipe, params, Examples(images[rows], labels[rows]))
        return jnp.mean(theta[rows] * each)

    problem = ug.training_problem(
        loss=loss,
        init_params=lambda key: run.start,
        optimizer=lambda theta, t: optax.adam(recipe.rate, eps_root=recipe.eps_root),
        meta_loss="before",
        horizon=recipe.horizon,
    )
    step = problem.step
    return problem._replace(step=lambda *args: step(*args, run.rows[args[-1]]))


def path(recipe: Recipe, run: Run, weights: jax.Array) -> Params:
    """The net at the beginning and after each step, along the leading axis of its arrays."""
    problem, key = weighted_training(recipe, run), jax.random.key(0)  # nothing depends on the key

    def step(state, t):
        return problem.step(key, weights, state, t)[0], state.params

    end, before = jax.lax.scan(step, problem.init(key, weights), jnp.arange(recipe.horizon))
    return jax.tree.map(lambda x, last: jnp.concatenate([x, last[None]]), before, end.params)


def trained(recipe: Recipe, run: Run, weights: jax.Array) -> Params:
    """The net after training."""
    problem, key = weighted_training(recipe, run), jax.random.key(0)

    def step(t, state):
        return problem.step(key, weights, state, t)[0]

    return jax.lax.fori_loop(0, recipe.horizon, step, problem.init(key, weights)).params
