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
        response_optimizer: From a learning rate to the optimizer of the response.
        evaluate: ``evaluate(params) -> (validation loss, test loss)``, on all of the data.
        kinds: The constraints of the hyperparameters.
        start: Their first values, in their own units.
    """

    loss: ug.stn.SplitLoss
    meta_loss: Callable[..., jax.Array]
    init_params: Callable[[jax.Array], Any]
    sample_batch: Callable[[jax.Array], Any]
    optimizer: optax.GradientTransformation
    response_optimizer: Callable[[Any], optax.GradientTransformation]
    evaluate: Callable[[Any], tuple[jax.Array, jax.Array]]
    kinds: dict[str, ug.constraints.Constraint]
    start: dict[str, Any]


class Tuning(NamedTuple):
    """How a self-tuning network moves the hyperparameters; the numbers may be traced.

    Attributes:
        learning_rate: Of theta's optimizer, RMSprop.
        response_rate: The learning rate of the response.
        sigma: The first standard deviation of the perturbations.
    """

    learning_rate: Any
    response_rate: Any
    sigma: Any


class Tuned(NamedTuple):
    """What a self-tuning network found.

    Attributes:
        losses: Validation and test losses at the points, shape (points, 2).
        schedule: The hyperparameters by call.
    """

    losses: np.ndarray
    schedule: ug.stn.Schedule


class Tuner(NamedTuple):
    """A self-tuning network.

    Attributes:
        build: ``build(data) -> Task``; the data are arguments of the compiled programs, so that
            all seeds share these.
        method: Which of the two networks.
        num_perturbations: Perturbations of each batch.
        warm_up: Calls before theta moves.
        every: Training steps between two points, a multiple of ``CALL``.
    """

    build: Callable[[Any], Task]
    method: Method
    num_perturbations: int
    warm_up: int
    every: int


def self_tuning(tuner: Tuner) -> Callable[[Any, jax.Array, Tuning, int], Tuned]:
    """Returns ``run(data, key, tuning, num_steps)``: one training with moving hyperparameters."""
    law = ug.stn.scaled_rows(initial_std=0.01 if tuner.method == "stn" else 0.0)

    def parts(data, tuning):
        task = tuner.build(data)
        estimator = getattr(ug.stn, tuner.method)(
            loss=task.loss,
            meta_loss=task.meta_loss,
            init_params=task.init_params,
            sample_batch=task.sample_batch,
            inner_optimizer=task.optimizer,
            response_optimizer=task.response_optimizer(tuning.response_rate),
            response=law,
            sigma=tuning.sigma,
            num_perturbations=tuner.num_perturbations,
            train_steps=CALL,
            warm_up=tuner.warm_up,
        )
        return task, estimator, optax.rmsprop(tuning.learning_rate)

    @jax.jit
    def begin(data, key, tuning):
        task, estimator, optimizer = parts(data, tuning)
        values = jax.tree.map(jnp.float32, task.start)
        theta = ug.constraints.unconstrain(task.kinds, values)
        return theta, estimator.init(key, theta), optimizer.init(theta)

    @jax.jit
    def stretch(data, key, tuning, carry):
        task, estimator, optimizer = parts(data, tuning)

        def call(carry, _):
            theta, state, of_theta = carry
            out, state = estimator.estimate(key, theta, state)
            updates, of_theta = optimizer.update(out.grad, of_theta, theta)
            history = {name: getattr(out.info, name) for name in ("theta", "sigma", "inner_steps")}
            history["loss"] = out.loss
            return (optax.apply_updates(theta, updates), state, of_theta), history

        carry, history = jax.lax.scan(call, carry, None, tuner.every // CALL)
        theta, state, _ = carry
        weights = state.carried.params
        if tuner.method == "stn":
            weights = jax.tree.map(jnp.add, weights, law.apply(state.carried.response, theta))
        return carry, jnp.stack(task.evaluate(weights)), history

    def run(data, key, tuning, num_steps):
        tuning = jax.tree.map(jnp.float32, tuning)
        carry, losses, histories = begin(data, key, tuning), [], []
        for _ in range(num_steps // tuner.every):
            carry, loss, history = stretch(data, key, tuning, carry)
            losses.append(loss)
            histories.append(history)
        joined = jax.tree.map(lambda *x: np.concatenate(x), *histories)
        kinds = tuner.build(data).kinds
        return Tuned(np.array(losses), ug.stn.schedule(joined, carry[0], kinds))

    return run


def plain(
    build: Callable[[Any], Task], every: int
) -> Callable[[Any, jax.Array, Any, int], np.ndarray]:
    """Returns ``run(data, key, values, num_steps)``: the losses at the points of a training.

    ``values`` are the hyperparameters in their own units, with a leading axis of one value for each
    ``CALL`` training steps; or without it, for fixed ones.
    """
    calls = every // CALL

    @jax.jit
    def begin(data, key):
        task = build(data)
        params = task.init_params(key)
        return params, task.optimizer.init(params)

    @jax.jit
    def stretch(data, key, values, carry):
        task = build(data)
        thetas = ug.constraints.unconstrain(task.kinds, values)

        def step(carry, i):
            params, state = carry
            theta = jax.tree.map(lambda x: x[i // CALL], thetas)
            of_batch, of_loss = jax.random.split(jax.random.fold_in(key, i))
            batch = task.sample_batch(of_batch)
            grad = jax.grad(lambda p: task.loss(theta, p, batch, of_loss))(params)
            updates, state = task.optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry, _ = jax.lax.scan(step, carry, jnp.arange(every))
        return carry, jnp.stack(task.evaluate(carry[0]))

    def run(data, key, values, num_steps):
        of_params, of_steps = jax.random.split(key)
        size = num_steps // CALL
        full = {name: np.broadcast_to(np.float32(x), (size,)) for name, x in values.items()}
        carry, losses = begin(data, of_params), []
        for i in range(num_steps // every):
            here = {name: x[i * calls : (i + 1) * calls] for name, x in full.items()}
            carry, loss = stretch(data, jax.random.fold_in(of_steps, i), here, carry)
            losses.append(loss)
        return np.array(losses)

    return run


def lowest(losses: np.ndarray) -> np.ndarray:
    """At each point the lowest validation loss so far, and the test loss of the same weights."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    best = np.minimum.accumulate(losses[:, 0])
    first = np.searchsorted(-best, -best, side="left")
    return np.stack([best, losses[first, 1]], axis=1)
