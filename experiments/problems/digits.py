"""A learning-rate and momentum schedule for an MLP on scikit-learn's digits.

The data are 1797 real 8x8 images that come with scikit-learn: nothing is downloaded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import unrollgrad as ug
from experiments.problems import data
from unrollgrad.problems import Example


class MLP(nnx.Module):
    """One hidden layer of ReLUs."""

    def __init__(self, inputs: int, hidden: int, classes: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(inputs, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, x):
        """Logits of a batch."""
        return self.out(nnx.relu(self.hidden(x)))


def digits(
    horizon: int = 100, *, num_knots: int = 4, hidden: int = 16, batch_size: int = 16
) -> Example:
    """SGD with momentum trains an MLP; theta is its schedule, and the loss the validation loss.

    theta = {"log_lr": (num_knots,), "momentum_logit": (num_knots,)} are the knots of two
    piecewise-linear schedules over the episode: the log learning rate and the logit of the
    momentum. Every episode draws new weights, and new batches of 1200 training images; the step
    loss is the cross-entropy on a batch of the other 597 images. At the default theta the rate
    falls from
    0.1 to 0.02 and the momentum is 0.9: training is smooth, so that backpropagation is a good
    reference.

    Args:
        horizon: Inner steps in an episode.
        num_knots: Knots per schedule.
        hidden: Units in the hidden layer.
        batch_size: Images in a training batch, and in a validation batch.

    Returns:
        ``Example(problem, theta)``.
    """
    optimizer, theta = schedule(horizon, num_knots)
    problem = ug.training_problem(
        **mlp_on_digits(hidden, batch_size), optimizer=optimizer, horizon=horizon
    )
    return Example(problem, theta)


def schedule(horizon: int, num_knots: int) -> tuple[Callable[[Any, Any], Any], Any]:
    """SGD with momentum whose learning rate and momentum are piecewise linear in t.

    Returns:
        ``optimizer(theta, t)``, and the default theta of ``digits``.
    """

    def at(knots, t):
        return jnp.interp(t / horizon * (num_knots - 1), jnp.arange(float(num_knots)), knots)

    def optimizer(theta, t):
        rate = jnp.exp(at(theta["log_lr"], t))
        return optax.sgd(rate, momentum=jax.nn.sigmoid(at(theta["momentum_logit"], t)))

    theta = {
        "log_lr": jnp.linspace(jnp.log(0.1), jnp.log(0.02), num_knots, dtype=jnp.float32),
        "momentum_logit": jnp.full(num_knots, jnp.log(9.0), jnp.float32),
    }
    return optimizer, theta


def mlp_on_digits(hidden: int, batch_size: int) -> dict[str, Any]:
    """The arguments of ``training_problem`` that describe the training of an MLP on the digits.

    Training batches are drawn from 1200 fixed images; the meta loss is the cross-entropy on a batch
    of the other 597 images.

    Args:
        hidden: Units in the hidden layer.
        batch_size: Images in a training batch, and in a validation batch.

    Returns:
        ``loss``, ``init_params``, ``sample_batch`` and ``meta_loss``.
    """
    images = data.load("digits")
    graph = nnx.graphdef(MLP(64, hidden, 10, rngs=nnx.Rngs(0)))

    def draw(split, key):
        rows = jax.random.randint(key, (batch_size,), 0, len(split.labels))
        return jnp.asarray(split.images)[rows], jnp.asarray(split.labels)[rows]

    def cross_entropy(params, batch):
        logits = nnx.merge(graph, params)(batch[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    return {
        "loss": lambda theta, params, batch, key: cross_entropy(params, batch),
        "init_params": lambda key: nnx.state(MLP(64, hidden, 10, rngs=nnx.Rngs(key)), nnx.Param),
        "sample_batch": lambda key: draw(images.train, key),
        "meta_loss": lambda theta, params, key: cross_entropy(params, draw(images.validation, key)),
    }
