"""Every estimator inside a user's own ``shard_map``: the numbers are those of a single device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import unrollgrad as ug
from tests.helpers import build, quadratic, rows

KEYS = jax.random.split(jax.random.key(0), 2)


def with_constants(problem):
    """Leaves of the initial state that depend on neither key nor theta."""
    return problem._replace(
        init=lambda key, theta: {**problem.init(key, theta), "n": jnp.int32(0)},
        evaluate=lambda key, theta, s: jnp.sum(s["x"] ** 2),
    )


@pytest.mark.parametrize("name", rows())
def test_each_device_is_its_own_worker(name):
    """Replicated theta, sharded keys and states: not the sum of the gradients, as jax.grad has."""
    problem, theta = quadratic()
    estimator = build(name, with_constants(problem))
    mesh = ug.make_worker_mesh(2)

    def init(keys, theta):
        return jax.tree.map(lambda x: x[None], estimator.init(keys[0], theta))

    def estimate(keys, theta, states):
        state = jax.tree.map(lambda x: x[0], states)
        out = estimator.estimate(keys[0], theta, state)
        return jax.tree.map(lambda x: x[None], out)

    one_each = P("workers")
    sharded_init = jax.shard_map(init, mesh=mesh, in_specs=(one_each, P()), out_specs=one_each)
    sharded = jax.shard_map(
        estimate, mesh=mesh, in_specs=(one_each, P(), one_each), out_specs=one_each
    )
    states = jax.jit(sharded_init)(KEYS, theta)
    for _ in range(2):
        many, states = jax.jit(sharded)(KEYS, theta, states)
    for i, key in enumerate(KEYS):
        state = estimator.init(key, theta)
        for _ in range(2):
            one, state = estimator.estimate(key, theta, state)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", rows())
def test_a_scan_over_calls(name):
    """The state of ``init`` is already what comes back, as a scan's carry has to be."""
    problem, theta = quadratic()
    estimator = build(name, with_constants(problem))

    def calls(keys, theta):
        def call(state, i):
            estimate, state = estimator.estimate(jax.random.fold_in(keys[0], i), theta, state)
            return state, estimate.loss

        return jax.lax.scan(call, estimator.init(keys[0], theta), jnp.arange(4))[1]

    mesh = ug.make_worker_mesh(2)
    sharded = jax.shard_map(calls, mesh=mesh, in_specs=(P("workers"), P()), out_specs=P("workers"))
    alone = jnp.concatenate([calls(KEYS[i : i + 1], theta) for i in range(2)])
    np.testing.assert_allclose(jax.jit(sharded)(KEYS, theta), alone, rtol=1e-5)


@pytest.mark.parametrize("make", [ug.problems.influence_balancing, ug.problems.lorenz])
def test_average_inside_shard_map(make):
    """Lorenz begins at an array that depends on nothing; its reset is a select under vmap."""
    problem, theta = make(horizon=20)
    workers = ug.average(ug.tbptt(problem, truncation=5), 3)
    mesh = ug.make_worker_mesh(2)

    def estimate(keys, theta):
        out, _ = workers.estimate(keys[0], theta, workers.init(keys[0], theta))
        return jax.tree.map(lambda x: x[None], out)

    sharded = jax.shard_map(
        estimate, mesh=mesh, in_specs=(P("workers"), P()), out_specs=P("workers")
    )
    many = jax.jit(sharded)(KEYS, theta)
    one, _ = workers.estimate(KEYS[1], theta, workers.init(KEYS[1], theta))
    np.testing.assert_allclose(many.grad[1], one.grad, rtol=1e-5)
