"""Small classifiers of scikit-learn's digits, regularised by many hyperparameters."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug
from experiments.stn.searches import Range
from experiments.stn.training import Task
from unrollgrad.running import need

Model = Literal["mlp", "conv_net"]

SIDE = 8
"""Images have 8 x 8 pixels."""

DROPOUTS = ("drop input", "drop 1", "drop 2")
DECAYS = ("decay 1", "decay 2", "decay 3")

COMMON = (*DROPOUTS, "noise", *DECAYS)
NAMES: dict[Model, tuple[str, ...]] = {"mlp": COMMON, "conv_net": (*COMMON, "contrast", "cutout")}
"""The hyperparameters of each model: 7 and 9."""

_RATE = Range(0.0, 0.85, False, "drop", (0.0, 0.2, 0.4, 0.6, 0.8))
_DECAY = Range(1e-6, 1e-1, True, "decay", (1e-5, 1e-4, 1e-3, 1e-2))

RANGES: dict[str, Range] = {
    **dict.fromkeys(DROPOUTS, _RATE),
    **dict.fromkeys(DECAYS, _DECAY),
    "noise": Range(1e-2, 1.0, True, "noise", (1e-2,)),
    "contrast": Range(0.0, 1.0, False, "contrast", (0.0,)),
    "cutout": Range(0.0, 6.0, False, "cutout", (0.0,)),
}
"""Where searches look, and in which self-tuning networks move; a grid ties rates, and decays."""

FIRST = 0.05
"""Where in its range each hyperparameter of a self-tuning network starts: little regularisation."""


class Sizes(NamedTuple):
    """The numbers of images, and of those in a training batch and in a validation batch."""

    train: int
    validation: int
    batch: int
    validation_batch: int


class Data(NamedTuple):
    """Images and labels of each set."""

    train: tuple[jax.Array, jax.Array]
    validation: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def data(sizes: Sizes, seed: int) -> Data:
    """The digits that the seed draws; those that are left over are for tests."""
    images, labels = need("sklearn.datasets", "scikit-learn").load_digits(return_X_y=True)
    images, labels = np.asarray(images / 16 - 0.5, np.float32), np.asarray(labels, np.int32)
    order = np.random.default_rng(seed).permutation(len(labels))
    parts = np.split(order, [sizes.train, sizes.train + sizes.validation])
    return Data(*((jnp.asarray(images[rows]), jnp.asarray(labels[rows])) for rows in parts))


def task(model: Model, sizes: Sizes, rate: float, here: Data) -> Task:
    """The training of a model on these images, by SGD with momentum 0.9."""
    ranges = {name: RANGES[name] for name in NAMES[model]}
    kinds = {name: x.constraint() for name, x in ranges.items()}
    predict = {"mlp": _mlp, "conv_net": _conv_net}[model]

    def sample(data, number, key):
        rows = jax.random.randint(key, (number,), 0, len(data[1]))
        return data[0][rows], data[1][rows]

    def noisy(theta, params, batch, key):
        values = ug.constraints.constrain(kinds, theta)
        return predict(values, params, batch[0], key), params

    def of_outputs(theta, outputs, batch, key):
        logits, params = outputs
        values = ug.constraints.constrain(kinds, theta)
        decays = (values[name] for name in DECAYS)
        norms = sum(d * jnp.sum(p["w"] ** 2) for d, p in zip(decays, params, strict=True))
        return cross_entropy(logits, batch[1]) + norms

    def plain(params, data):
        return cross_entropy(predict(None, params, data[0], None), data[1])

    return Task(
        loss=ug.stn.SplitLoss(noisy, of_outputs),
        meta_loss=lambda theta, params, key: plain(
            params, sample(here.validation, sizes.validation_batch, key)
        ),
        init_params={"mlp": _init_mlp, "conv_net": _init_conv_net}[model],
        sample_batch=lambda key: sample(here.train, sizes.batch, key),
        optimizer=optax.sgd(rate, momentum=0.9),
        response_optimizer=lambda rate: optax.sgd(rate, momentum=0.9),
        evaluate=lambda params: (plain(params, here.validation), plain(params, here.test)),
        kinds=kinds,
        start={name: x.at(FIRST) for name, x in ranges.items()},
    )


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean cross-entropy, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def _init(key: jax.Array, shapes: list[tuple[int, ...]]) -> list[dict[str, jax.Array]]:
    return [
        {
            "w": jax.random.normal(k, s) * np.float32(np.sqrt(2 / np.prod(s[:-1]))),
            "b": jnp.zeros(s[-1]),
        }
        for k, s in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def _init_mlp(key: jax.Array) -> list[dict[str, jax.Array]]:
    return _init(key, [(SIDE**2, 64), (64, 64), (64, 10)])


def _init_conv_net(key: jax.Array) -> list[dict[str, jax.Array]]:
    return _init(key, [(3, 3, 1, 8), (3, 3, 8, 16), (64, 10)])


def _mlp(values: Any, params: Any, x: jax.Array, key: Any) -> jax.Array:
    """Logits; without values nothing is noisy."""
    keys: Any = [None] * 4 if values is None else jax.random.split(key, 4)
    x = _drop(values, "drop input", _with_noise(values, x, keys[0]), keys[1])
    for i, layer in enumerate(params[:-1]):
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
        x = _drop(values, DROPOUTS[i + 1], x, keys[2 + i])
    return x @ params[-1]["w"] + params[-1]["b"]


def _conv_net(values: Any, params: Any, x: jax.Array, key: Any) -> jax.Array:
    """Logits: two convolutions with stride 2 and a linear layer."""
    keys: Any = [None] * 6 if values is None else jax.random.split(key, 6)
    x = x.reshape(-1, SIDE, SIDE, 1)
    if values is not None:
        amount = jax.random.uniform(keys[4], (len(x), 1, 1, 1), minval=-1.0)
        x = _cut(values["cutout"], x * (1 + values["contrast"] * amount), keys[5])
    x = _drop(values, "drop input", _with_noise(values, x, keys[0]), keys[1])
    for i, layer in enumerate(params[:-1]):
        x = jax.lax.conv_general_dilated(
            x, layer["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = _drop(values, DROPOUTS[i + 1], jax.nn.relu(x + layer["b"]), keys[2 + i])
    return x.reshape(len(x), -1) @ params[-1]["w"] + params[-1]["b"]


def _with_noise(values: Any, x: jax.Array, key: Any) -> jax.Array:
    return x if values is None else x + values["noise"] * jax.random.normal(key, x.shape)


def _drop(values: Any, name: str, x: jax.Array, key: Any) -> jax.Array:
    if values is None:
        return x
    keep = 1 - values[name]
    return jnp.where(jax.random.uniform(key, x.shape) < keep, x / keep, 0.0)


def _cut(side: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
    """Greys a square of a whole number of pixels at a random place of each image."""
    side = jnp.floor(side)
    corner = jax.random.randint(key, (len(x), 2, 1), -2, SIDE)
    away = jnp.arange(SIDE) - corner
    row, column = jnp.moveaxis((away >= 0) & (away < side), 1, 0)
    return jnp.where((row[:, :, None] & column[:, None, :])[..., None], 0.0, x)
