"""Estimators inside a user's own ``shard_map`` give the numbers of a single device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import unrollgrad as ug
from tests.helpers import build, numbers, quadratic
from unrollgrad.estimators import REGISTRY

KEYS = jax.random.split(jax.random.key(0), 2)


@functools.cache
def with_constants():
    """A problem whose initial state has leaves that depend on neither key nor theta."""
    plain, theta = quadratic()
    problem = plain._replace(
        init=lambda key, theta: {**plain.init(key, theta), "n": jnp.int32(0)},
        evaluate=lambda key, theta, s: jnp.sum(s["x"] ** 2),
    )
    return problem, theta


def calls(estimator, key, theta):
    """Four calls in a scan, so that every call has to return a state of ``init``'s type."""

    def call(state, i):
        estimate, state = estimator.estimate(jax.random.fold_in(key, i), theta, state)
        return state, estimate

    return jax.lax.scan(call, estimator.init(key, theta), jnp.arange(4))


def on_each_device(function):
    """Every device has the replicated theta and its own key."""

    def body(keys, theta):
        return jax.tree.map(lambda x: x[None], function(keys[0], theta))

    mesh, each = ug.make_worker_mesh(2), P("workers")
    return jax.shard_map(body, mesh=mesh, in_specs=(each, P()), out_specs=each)


@pytest.mark.parametrize("name", REGISTRY)
def test_the_types_fit_and_nothing_is_added_up_over_devices(name):
    """Only traced: ``jax.grad`` for a replicated theta would sum over devices by ``psum``."""
    problem, theta = with_constants()
    sharded = on_each_device(functools.partial(calls, build(name, problem)))
    text = str(jax.make_jaxpr(sharded)(KEYS, theta))
    assert "psum" not in text
    assert "pmax" not in text


@pytest.mark.parametrize(
    "law", [ug.noise.gaussian(), ug.noise.low_rank(2, "gaussian"), ug.noise.low_rank()]
)
def test_noise_of_a_large_leaf_varies_as_its_key_does(law):
    """Only traced; what is drawn block by block, and held, begins with zeros in a loop."""
    pytest.importorskip("quax", reason="structured noise needs the extra `lowrank`")
    theta = {"w": jax.ShapeDtypeStruct((300, 200), "float32"), "v": jnp.zeros(40_000)}

    def step(key, theta, s, t):
        return s, jnp.sum(s @ theta["w"]) + jnp.sum(theta["v"])

    problem = ug.UnrolledProblem(lambda key, theta: jnp.ones(300), step, 4)
    pes = ug.pes(problem, truncation=1, sigma=0.1, num_pairs=2, noise=law)
    jax.eval_shape(on_each_device(functools.partial(calls, pes)), KEYS, theta)


@pytest.mark.parametrize("name", ["pes", "tbptt", "reparameterized_es", "uoro"])
def test_each_device_is_its_own_worker(name):
    """With a replicated theta each device gets its own gradient, not the sum, as in jax.grad."""
    problem, theta = with_constants()
    run = functools.partial(calls, build(name, problem))
    many = numbers(jax.jit(on_each_device(run))(KEYS, theta))
    alone = jax.jit(run)
    for i, key in enumerate(KEYS):
        mine = jax.tree.map(lambda x: x[i], many)  # noqa: B023
        chex.assert_trees_all_close(mine, numbers(alone(key, theta)), rtol=1e-5, atol=1e-6)


def test_average_inside_shard_map():
    """Lorenz begins at a constant array; under vmap its reset is a select."""
    problem, theta = ug.problems.lorenz(horizon=20)
    workers = ug.average(ug.tbptt(problem, truncation=5), 3)

    def estimate(key, theta):
        return workers.estimate(key, theta, workers.init(key, theta))[0].grad

    many = jax.jit(on_each_device(estimate))(KEYS, theta)
    one = jax.jit(estimate)
    for i, key in enumerate(KEYS):
        np.testing.assert_allclose(many[i], one(key, theta), rtol=1e-5)
