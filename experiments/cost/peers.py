"""The same outer training in several codes: by hand, by peers where they are installed, and ours.

Every program makes the same number of outer updates of persistent evolution strategies with the
same inner loop, pairs, windows and optimizer, 100 updates in a compiled program unless its name
says otherwise. The random numbers differ.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import unrollgrad as ug
from unrollgrad.problems import Example
from unrollgrad.types import GradientEstimator, Key, State, Theta

PER_PROGRAM = 100


class Task(NamedTuple):
    """An outer training.

    Attributes:
        make: ``make(horizon) -> Example``.
        horizon: Inner steps in an episode.
        truncation: Inner steps in a window.
        num_pairs: Antithetic pairs.
        sigma: Standard deviation of the perturbations.
        optimizer: The outer optimizer.
    """

    make: Callable[[int], Example]
    horizon: int
    truncation: int
    num_pairs: int
    sigma: float
    optimizer: optax.GradientTransformation


TASKS = {
    "toy regression": Task(ug.problems.toy_regression, 100, 10, 50, 0.3, optax.adam(1e-2)),
    "influence balancing": Task(
        ug.problems.influence_balancing, 1000, 1, 500, 0.1, optax.sgd(1e-4)
    ),
}


def programs(task: Task, num_steps: int) -> dict[str, Callable[[], object]]:
    """Functions by name that make ``num_steps`` outer updates, a multiple of 100."""
    problem, theta = task.make(task.horizon)
    settings = {"truncation": task.truncation, "sigma": task.sigma}
    pairs = ug.pes(problem, **settings, num_pairs=task.num_pairs)
    workers = ug.average(ug.pes(problem, **settings), task.num_pairs)
    found = {
        "by hand": _by_hand(task, num_steps),
        "fit, one worker": _fit(task, pairs, theta, num_steps),
        "fit, workers of one pair": _fit(task, workers, theta, num_steps),
        "by hand, an update a call": _by_hand(task, num_steps, 1),
        "ours, an update a call": _calls(task, workers, theta, num_steps, jitted=True),
        "ours, without jit": _calls(task, workers, theta, num_steps, jitted=False),
    }
    if importlib.util.find_spec("evosax"):
        found["evosax"] = _evosax(task, num_steps)
    return found


def _fit(task: Task, estimator: GradientEstimator, theta: Theta, num_steps: int):
    return functools.partial(
        ug.fit, estimator, theta, task.optimizer, num_steps=num_steps, key=jax.random.key(0)
    )


def _calls(task: Task, estimator: GradientEstimator, theta: Theta, num_steps: int, jitted: bool):
    """The loop of docs/index.md."""

    def update(key, theta, state, opt_state):
        estimate, state = estimator.estimate(key, theta, state)
        updates, opt_state = task.optimizer.update(estimate.grad, opt_state, theta)
        return optax.apply_updates(theta, updates), state, opt_state

    update = jax.jit(update) if jitted else update
    key = jax.random.key(0)
    start = theta, estimator.init(key, theta), task.optimizer.init(theta)

    def program():
        carry = start
        for i in range(num_steps):
            carry = update(jax.random.fold_in(key, i), *carry)
        return carry

    return program


class _Loop(NamedTuple):
    """Persistent evolution strategies as a user would write them: theta is a vector."""

    theta: jax.Array
    opt_state: Any
    states: State
    accumulated: jax.Array
    t: jax.Array


def _windows(task: Task, key: Key, theta: jax.Array, thetas: jax.Array, states: State, t):
    """Runs a window of every particle; an episode's first window begins with new states."""
    problem, example = task.make(task.horizon)
    unravel = ravel_pytree(example)[1]

    def step(theta, state, i):
        return problem.step(jax.random.fold_in(key, i), unravel(theta), state, t + i)

    def run(theta, state):
        return jax.lax.scan(functools.partial(step, theta), state, jnp.arange(task.truncation))

    def begin():
        state = problem.init(key, unravel(theta))
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(thetas), *x.shape)), state)

    states, losses = jax.vmap(run)(thetas, jax.lax.cond(t == 0, begin, lambda: states))
    return states, losses.mean(1)


def _start(task: Task) -> tuple[jax.Array, State]:
    problem, theta = task.make(task.horizon)
    state = problem.init(jax.random.key(0), theta)
    particles = 2 * task.num_pairs
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (particles, *jnp.shape(x))), state)
    return ravel_pytree(theta)[0], states


def _in_programs(update, start, num_steps: int, size: int) -> Callable[[], object]:
    """Scans ``size`` updates in a program; their losses are fetched after each."""

    @jax.jit
    def program(carry, key, first):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(size))
        if size == 1:
            return update(carry, keys[0])
        return jax.lax.scan(update, carry, keys)

    def run():
        carry = start
        for first in range(0, num_steps, size):
            carry, losses = program(carry, jax.random.key(0), first)
            if size > 1:
                jax.device_get(losses)
        return carry

    return run


def _by_hand(task: Task, num_steps: int, size: int = PER_PROGRAM) -> Callable[[], object]:
    theta, states = _start(task)
    dim, num_pairs, sigma = theta.size, task.num_pairs, task.sigma

    def update(loop: _Loop, key):
        theta, opt_state, states, accumulated, t = loop
        key_noise, key_steps = jax.random.split(key)
        eps = sigma * jax.random.normal(key_noise, (num_pairs, dim))
        thetas = theta + jnp.concatenate([eps, -eps])
        states, losses = _windows(task, key_steps, theta, thetas, states, t)
        accumulated = jnp.where(t == 0, 0, accumulated) + eps
        differences = losses[:num_pairs] - losses[num_pairs:]
        grad = differences @ accumulated / (2 * num_pairs * sigma**2)
        updates, opt_state = task.optimizer.update(grad, opt_state, theta)
        t = jnp.where(t + task.truncation >= task.horizon, 0, t + task.truncation)
        theta = jnp.asarray(optax.apply_updates(theta, updates))
        return _Loop(theta, opt_state, states, accumulated, t), losses.mean()

    zeros = jnp.zeros((num_pairs, dim))
    start = _Loop(theta, task.optimizer.init(theta), states, zeros, jnp.int32(0))
    return _in_programs(update, start, num_steps, size)


def _evosax(task: Task, num_steps: int) -> Callable[[], object]:
    algorithms: Any = importlib.import_module("evosax.algorithms")
    theta, states = _start(task)
    strategy = algorithms.PersistentES(
        population_size=2 * task.num_pairs,
        solution=theta,
        optimizer=task.optimizer,
        std_schedule=optax.constant_schedule(task.sigma),
    )
    params = strategy.default_params.replace(T=task.horizon, K=task.truncation)

    def update(carry, key):
        own, states = carry
        keys = jax.random.split(key, 3)
        thetas, own = strategy.ask(keys[0], own, params)
        t = own.inner_step_counter
        states, losses = _windows(task, keys[1], own.mean, thetas, states, t)
        own, _ = strategy.tell(keys[2], thetas, losses, own, params)
        return (own, states), losses.mean()

    own = strategy.init(jax.random.key(0), theta, params)
    own = jax.tree.map(jnp.asarray, own)
    return _in_programs(update, (own, states), num_steps, PER_PROGRAM)
