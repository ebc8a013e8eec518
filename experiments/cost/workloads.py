"""The inner loops on which estimators are timed, on generated data."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import unrollgrad as ug
from experiments.learned import tasks
from experiments.problems.digits import MLP, schedule
from experiments.problems.learned_optimizer import learned_optimizer
from unrollgrad.problems import Example


class Workload(NamedTuple):
    """An inner loop with its windows and perturbations.

    Attributes:
        make: ``make(horizon) -> Example``.
        truncation: Inner steps per window, which is one call of an estimator (K).
        windows: Windows per episode.
        particles: The default number of trajectories that run side by side.
        sigma: Standard deviation of the perturbations, in theta's units.
    """

    make: Callable[[int], Example]
    truncation: int
    windows: int
    particles: int
    sigma: float


def mlp_schedule(horizon: int, sizes: tuple[int, int, int], batch: int) -> Example:
    """The learning-rate and momentum schedule of an MLP, on random images of random classes."""
    keys = jax.random.split(jax.random.key(0), 2)
    images = jax.random.normal(keys[0], (10 * batch, sizes[0]))
    labels = jax.random.randint(keys[1], (10 * batch,), 0, sizes[2])
    graph = nnx.graphdef(MLP(*sizes, rngs=nnx.Rngs(0)))
    optimizer, theta = schedule(horizon, 4)

    def loss(theta, params, rows, key):
        logits = nnx.merge(graph, params)(images[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

    problem = ug.training_problem(
        loss=loss,
        init_params=lambda key: nnx.state(MLP(*sizes, rngs=nnx.Rngs(key)), nnx.Param),
        optimizer=optimizer,
        sample_batch=lambda key: jax.random.randint(key, (batch,), 0, len(images)),
        horizon=horizon,
    )
    return Example(problem, theta)


class Block(nnx.Module):
    """Attention and an MLP, each with a residual connection."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List(nnx.LayerNorm(width, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            4, width, decode=False, deterministic=True, rngs=rngs
        )
        self.mlp = MLP(width, 4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        """Returns the features at every position of a batch of texts."""
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.mlp(self.norms[1](x))


class Transformer(nnx.Module):
    """Embeddings of symbols and positions, blocks of attention and an MLP, and logits."""

    def __init__(self, width: int, layers: int, length: int, symbols: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(symbols, width, rngs=rngs)
        self.place = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, rngs=rngs) for _ in range(layers))
        self.out = nnx.Linear(width, symbols, rngs=rngs)

    def __call__(self, x):
        """Returns the logits of the next symbols in a batch of texts."""
        mask = nnx.make_causal_mask(x)
        x = self.embed(x) + self.place(jnp.arange(x.shape[1]))
        for block in self.blocks:
            x = block(x, mask)
        return self.out(x)


def transformer_schedule(
    horizon: int, width: int, layers: int, length: int, batch: int, symbols: int = 64
) -> Example:
    """The learning-rate and momentum schedule of a transformer, on a random text."""
    text = jax.random.randint(jax.random.key(0), (10_000,), 0, symbols)
    graph = nnx.graphdef(Transformer(width, layers, length, symbols, rngs=nnx.Rngs(0)))
    optimizer, theta = schedule(horizon, 4)

    def init_params(key):
        return nnx.state(Transformer(width, layers, length, symbols, rngs=nnx.Rngs(key)), nnx.Param)

    def sample(key):
        places = jax.random.randint(key, (batch, 1), 0, len(text) - length - 1)
        return text[places + jnp.arange(length + 1)]

    def loss(theta, params, batch, key):
        logits = nnx.merge(graph, params)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    problem = ug.training_problem(
        loss=loss,
        init_params=init_params,
        optimizer=optimizer,
        sample_batch=sample,
        horizon=horizon,
    )
    return Example(problem, theta)


def meta_training(horizon: int) -> Example:
    """A learned optimizer; every episode draws a new task."""
    rule = ug.learned_optimizers.mlp(hidden=(16, 16))
    return Example(tasks.problem(tasks.mlps(), rule, horizon), rule.init(jax.random.key(0)))


def leaky_sum(horizon: int, size: int) -> Example:
    """A leaky sum, x / 2 + theta, with a mean square as loss: the cost of a step is negligible.

    State and theta have the same size; nearly all memory and time is due to the estimator.
    """

    def init(key, theta):
        return jnp.zeros(size)

    def step(key, theta, x, t):
        x = 0.5 * x + theta
        return x, jnp.mean((x - 1.0) ** 2)

    return Example(ug.UnrolledProblem(init, step, horizon), jnp.zeros(size))


def workloads(scale: str) -> dict[str, Workload]:
    """The workloads by name. The scale sets the size of "large"; for "smoke" all are small.

    For "paper" all but "large" have 4096 particles.
    """
    if scale == "smoke":
        sizes, batch, large, cut = (8, 4, 3), 4, (8, 1, 4, 2), 2
    else:
        sizes, batch, cut = (784, 100, 10), 100, 10
        large = (64, 2, 32, 8) if scale == "cpu" else (512, 6, 256, 32)
    medium = Workload(lambda horizon: mlp_schedule(horizon, sizes, batch), cut, 5, 16, 0.1)
    learned = Workload(learned_optimizer, 2 * cut, 5, 16, 0.01)
    of_large = Workload(lambda horizon: transformer_schedule(horizon, *large), cut, 2, 4, 0.1)
    small = {
        "tiny": Workload(ug.problems.influence_balancing, cut, 10, 1000, 0.1),
        "medium": medium,
        "medium, K=1": in_single_steps(medium),
        "learned optimizer": learned,
        "learned optimizer, K=1": in_single_steps(learned),
        "meta-training": Workload(meta_training, cut, 5, 16, 0.01),
    }
    if scale == "paper":
        small = {name: w._replace(particles=4096) for name, w in small.items()}
    return {**small, "large": of_large}


def in_single_steps(workload: Workload) -> Workload:
    """The same episodes in windows of one step."""
    return workload._replace(truncation=1, windows=workload.truncation * workload.windows)


NAMES = tuple(workloads("smoke"))
