"""Training with hyperparameters that a self-tuning network, a schedule or a search chooses."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import unrollgrad as ug

Method = Literal["delta_stn", "stn"]

CALL = 5
"""Training steps of a self-tuning network between two steps of the hyperparameters."""


class Task(NamedTuple):
    """A network and its training, as ``ug.stn.delta_stn`` takes them.

    Attributes:
        loss: The training loss, split where the outputs are.
        meta_loss: The validation loss on a batch; hyperparameters do not appear in it.
        init_params: Draws the weights.
        sample_batch: Draws a training batch.
        optimizer: The optimizer of the weights.
        evaluate: ``evaluate(params) -> (validation loss, test loss)``, on all of the data.
        kinds: The constraints of the hyperparameters.
        start: Their first values, in their own units.
    """

    loss: ug.stn.SplitLoss
    meta_loss: Callable[..., jax.Array]
    init_params: Callable[[jax.Array], Any]
    sample_batch: Callable[[jax.Array], Any]
    optimizer: optax.GradientTransformation
    evaluate: Callable[[Any], tuple[jax.Array, jax.Array]]
    kinds: dict[str, ug.constraints.Constraint]
    start: dict[str, Any]


class Tuning(NamedTuple):
    """How a self-tuning network moves the hyperparameters; the numbers may be traced.

    Attributes:
        learning_rate: Of theta's optimizer, RMSprop.
        response_rate: The rate of the response's SGD with momentum 0.9.
        sigma: The first standard deviation of the perturbations.
    """

    learning_rate: Any
    response_rate: Any
    sigma: Any


class Length(NamedTuple):
    """Training steps, and how often the losses are measured; both multiples of ``CALL``."""

    num_steps: int
    every: int


class Tuned(NamedTuple):
    """What a self-tuning network found.

    Attributes:
        losses: Validation and test losses at the points, shape (points, 2).
        schedule: The hyperparameters by call.
    """

    losses: np.ndarray
    schedule: ug.stn.Schedule


class Tuner(NamedTuple):
    """A self-tuning network on a task.

    Attributes:
        task: The network and its training.
        method: Which of the two.
        num_perturbations: Perturbations of each batch.
        warm_up: Calls before theta moves.
    """

    task: Task
    method: Method
    num_perturbations: int = 1
    warm_up: int = 0

    def __call__(self, key: jax.Array, tuning: Tuning, length: Length) -> tuple[Any, Any]:
        """Trains once while the hyperparameters are tuned; works under ``jit`` and ``vmap``.

        Returns:
            The validation and test losses at the points, and the history, as ``ug.fit``'s.
        """
        task, law = self.task, ug.stn.scaled_rows(initial_std=0.01 if self.method == "stn" else 0.0)
        estimator = getattr(ug.stn, self.method)(
            loss=task.loss,
            meta_loss=task.meta_loss,
            init_params=task.init_params,
            sample_batch=task.sample_batch,
            inner_optimizer=task.optimizer,
            response_optimizer=optax.sgd(tuning.response_rate, momentum=0.9),
            response=law,
            sigma=tuning.sigma,
            num_perturbations=self.num_perturbations,
            train_steps=CALL,
            warm_up=self.warm_up,
        )
        optimizer, start = optax.rmsprop(tuning.learning_rate), self.start

        def weights(theta, carried):
            if self.method == "delta_stn":
                return carried.params
            return jax.tree.map(jnp.add, carried.params, law.apply(carried.response, theta))

        def call(carry, _):
            theta, state, of_theta = carry
            out, state = estimator.estimate(key, theta, state)
            updates, of_theta = optimizer.update(out.grad, of_theta, theta)
            history = {name: getattr(out.info, name) for name in ("theta", "sigma", "inner_steps")}
            history["loss"] = out.loss
            return (optax.apply_updates(theta, updates), state, of_theta), history

        def stretch(carry, _):
            carry, history = jax.lax.scan(call, carry, None, length.every // CALL)
            theta, state, _ = carry
            return carry, (jnp.stack(task.evaluate(weights(theta, state.carried))), history)

        carry = start, estimator.init(key, start), optimizer.init(start)
        return jax.lax.scan(stretch, carry, None, length.num_steps // length.every)[1]

    @property
    def start(self) -> Any:
        """The first theta."""
        values = jax.tree.map(jnp.float32, self.task.start)
        return ug.constraints.unconstrain(self.task.kinds, values)

    def found(self, outcome: tuple[Any, Any]) -> Tuned:
        """The outcome of a call as NumPy arrays and a schedule."""
        losses, history = jax.tree.map(np.asarray, outcome)
        history = {k: x.reshape(-1, *x.shape[2:]) for k, x in history.items()}
        return Tuned(losses, ug.stn.schedule(history, self.start, self.task.kinds))


def scheduled(task: Task, length: Length) -> Callable[[jax.Array, Any], np.ndarray]:
    """Returns ``run(key, values)``: the losses at the points of a plain training.

    ``values`` are the hyperparameters in their own units, with a leading axis of one value for each
    ``CALL`` training steps; or without it, for fixed ones.
    """
    calls = length.every // CALL

    def step(carry, key, theta):
        params, state = carry
        of_batch, of_loss = jax.random.split(key)
        batch = task.sample_batch(of_batch)
        grad = jax.grad(lambda p: task.loss(theta, p, batch, of_loss))(params)
        updates, state = task.optimizer.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def program(key, values):
        of_params, of_steps = jax.random.split(key)
        params = task.init_params(of_params)
        thetas = ug.constraints.unconstrain(task.kinds, values)

        def call(carry, i):
            theta = jax.tree.map(lambda x: x[i], thetas)
            keys = jax.random.split(jax.random.fold_in(of_steps, i), CALL)
            return jax.lax.scan(lambda c, k: (step(c, k, theta), None), carry, keys)[0], None

        def stretch(carry, first):
            carry, _ = jax.lax.scan(call, carry, first + jnp.arange(calls))
            return carry, jnp.stack(task.evaluate(carry[0]))

        starts = calls * jnp.arange(length.num_steps // length.every)
        return jax.lax.scan(stretch, (params, task.optimizer.init(params)), starts)[1]

    def run(key, values):
        full = {
            name: jnp.broadcast_to(jnp.float32(x), (length.num_steps // CALL,))
            for name, x in values.items()
        }
        return np.asarray(program(key, full))

    return run


def lowest(losses: np.ndarray) -> np.ndarray:
    """At each point the lowest validation loss so far, and the test loss of the same weights."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    best = np.minimum.accumulate(losses[:, 0])
    first = np.searchsorted(-best, -best, side="left")
    return np.stack([best, losses[first, 1]], axis=1)
