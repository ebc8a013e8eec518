"""Estimators as ``average`` runs them, and their floors: the bare unrolls in plain jax.

A floor runs the same particles through the same inner steps, in one jitted program of vmap and
scan, with given perturbed thetas: it draws no noise and estimates nothing. The floor of ``bptt``
and ``tbptt`` is the bare ``value_and_grad`` of the same windows, from given states inside an
episode; with windows of one step, every window includes an ``init``. The other estimators that
differentiate (``dodge``, ``uoro``, ``pes_analytic``, ``reparameterized_es``) are compared with
their forward passes, so their ratio must be higher.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

import unrollgrad as ug
from experiments.cost.workloads import Workload
from unrollgrad.estimators import REGISTRY
from unrollgrad.types import GradientEstimator, Key, State, Theta, UnrolledProblem, WorkerState


class Case(NamedTuple):
    """An estimator on a workload, and its floor.

    Attributes:
        episode: ``episode(key, theta, state)`` makes all calls of an episode, as ``calls`` says.
        floor: The same unrolls alone.
        args: The arguments of ``episode``.
        floor_args: The arguments of ``floor``.
        num_calls: Calls per episode.
        num_steps: Inner steps per call, summed over particles.
        num_workers: Workers of ``average``.
    """

    episode: Callable[..., Any]
    floor: Callable[..., Any]
    args: tuple[Any, ...]
    floor_args: tuple[Any, ...]
    num_calls: int
    num_steps: int
    num_workers: int


def case(
    workload: Workload,
    name: str,
    key: Key,
    *,
    particles: int,
    num_pairs: int = 1,
    devices: int | None = None,
) -> Case:
    """An estimator as ``average`` runs it, and its floor.

    Args:
        workload: The inner loop and its windows.
        name: The estimator's name in the registry.
        key: The key of all random numbers.
        particles: Trajectories, counting both signs of all pairs; a worker without pairs has one.
        num_pairs: Antithetic pairs per worker.
        devices: The number of devices of the mesh; None for no mesh.
    """
    row, truncation = REGISTRY[name], workload.truncation
    horizon = truncation * workload.windows
    problem, theta = workload.make(horizon)
    num_pairs = max(num_pairs, row.least_pairs)
    num_workers = max(1, particles // (2 * num_pairs if row.takes("num_pairs") else 1))
    estimator = row.build(
        problem,
        truncation=truncation,
        sigma=workload.sigma,
        noise_period=2 * truncation,
        num_pairs=num_pairs,
    )
    mesh = None if devices is None else ug.make_worker_mesh(devices)
    average = ug.average(estimator, num_workers, mesh=mesh)
    passes, num_steps = row.passes(num_pairs), estimator.truncation or horizon
    num_calls = horizon // num_steps
    if name in ("bptt", "tbptt"):
        floor = backwards(problem, num_steps, num_calls)
    else:
        floor = forwards(problem, num_steps, num_calls)
    keys = jax.random.split(key, num_workers)
    if name in ("bptt", "tbptt"):
        states = jax.vmap(lambda key: problem.init(key, theta), axis_size=num_workers)(keys)
        floor_args = keys, theta, states
    else:
        near = 1 + 1e-3 * jax.random.normal(key, (num_workers, passes))
        floor_args = keys, jax.tree.map(lambda x: jnp.multiply.outer(near, x), theta)
    return Case(
        episode=calls(average, num_calls),
        floor=floor,
        args=(key, theta, average.init(key, theta)),
        floor_args=floor_args,
        num_calls=num_calls,
        num_steps=num_workers * passes * num_steps,
        num_workers=num_workers,
    )


def calls(estimator: GradientEstimator, num_calls: int) -> Callable[..., Any]:
    """An episode's calls; they return ((state, sum of gradients), losses)."""

    def episode(
        key: Key, theta: Theta, state: WorkerState
    ) -> tuple[tuple[WorkerState, Theta], jax.Array]:
        def call(carry, i):
            state, total = carry
            out, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
            return (state, optax.tree.add(total, out.grad)), out.loss

        carry = state, optax.tree.zeros_like(theta)
        return jax.lax.scan(call, carry, jnp.arange(num_calls))

    return episode


def unroll(
    problem: UnrolledProblem,
    num_steps: int,
    key: Key,
    theta: Theta,
    state: State,
    first: chex.Numeric,
) -> tuple[State, jax.Array]:
    """Takes ``num_steps`` inner steps from step ``first``; returns the state and the mean loss."""

    def step(state, t):
        return problem.step(jax.random.fold_in(key, t), theta, state, t)

    state, losses = jax.lax.scan(step, state, first + jnp.arange(num_steps, dtype=jnp.int32))
    return state, jnp.mean(losses)


def forwards(problem: UnrolledProblem, num_steps: int, num_calls: int) -> Callable[..., Any]:
    """Runs particles through an episode: keys (workers,), thetas (workers, particles each)."""

    def worker(key: Key, thetas: Theta) -> tuple[State, jax.Array]:
        states = jax.vmap(lambda theta: problem.init(key, theta))(thetas)

        def window(states, i):
            return jax.vmap(
                lambda theta, state: unroll(problem, num_steps, key, theta, state, i * num_steps)
            )(thetas, states)

        if num_calls == 1:
            return window(states, jnp.int32(0))
        return jax.lax.scan(window, states, jnp.arange(num_calls, dtype=jnp.int32))

    return lambda keys, thetas: jax.vmap(worker)(keys, thetas)


def backwards(problem: UnrolledProblem, num_steps: int, num_calls: int) -> Callable[..., Any]:
    """Differentiates every window of an episode: keys and first states (workers,), one theta."""

    def whole(key: Key, theta: Theta, state: State) -> tuple[jax.Array, Theta]:
        def loss(theta):
            first = problem.init(key, theta)
            return unroll(problem, num_steps, key, theta, first, jnp.int32(0))[1]

        return jax.value_and_grad(loss)(theta)

    def windows(key: Key, theta: Theta, state: State) -> tuple[State, tuple[jax.Array, Theta]]:
        def window(state, i):
            def loss(theta):
                if num_steps == 1:
                    # Its own key keeps XLA from moving it out of the loop over windows.
                    begun = problem.init(jax.random.fold_in(key, i), theta)
                    before = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), begun, state)
                else:
                    before = state
                return unroll(problem, num_steps, key, theta, before, i * num_steps)[::-1]

            (value, state), grad = jax.value_and_grad(loss, has_aux=True)(theta)
            return state, (value, grad)

        return jax.lax.scan(window, state, jnp.arange(num_calls, dtype=jnp.int32))

    return jax.vmap(whole if num_calls == 1 else windows, in_axes=(0, None, 0))
