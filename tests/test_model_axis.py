"""``average`` on a mesh with a second axis, over which theta and the inner states are spread."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import unrollgrad as ug
from tests.helpers import numbers, present

KEY = jax.random.key(0)
SPECS = {"w": P(None, "model"), "b": P("model"), "v": P("model", None)}
IN, OUT = 64, 128
"""Theta's two matrices have 8192 numbers, more than any other array that a device needs."""


def mesh_of(workers, model):
    return jax.make_mesh((workers, model), ("workers", "model"), axis_types=(AxisType.Auto,) * 2)


def problem(mesh=None):
    """Two products per step. On a mesh the state is spread; it keeps what was drawn."""

    def spread(x):
        return (
            x
            if mesh is None
            else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("model")))
        )

    def init(key, theta):
        return {"x": spread(jnp.zeros(IN)), "drawn": jnp.zeros(IN)}

    def step(key, theta, state, t):
        drawn = jax.random.uniform(key, (IN,))
        y = jnp.tanh((state["x"] + drawn) @ theta["w"] + theta["b"])
        x = spread(0.5 * state["x"] + 0.5 * y @ theta["v"])
        return {"x": x, "drawn": drawn}, jnp.mean((x - 1) ** 2)

    return ug.UnrolledProblem(init, step, 4)


def theta_on(mesh=None):
    rng = np.random.default_rng(0)
    shapes = {"w": (IN, OUT), "b": (OUT,), "v": (OUT, IN)}
    theta = {k: rng.normal(size=s).astype(np.float32) / 10 for k, s in shapes.items()}
    if mesh is None:
        return theta
    return {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in theta.items()}


def low_rank(mesh=None):
    law = ug.noise.low_rank()
    return ug.es_single(problem(mesh), truncation=2, sigma=0.05, num_pairs=2, noise=law)


@functools.cache
def two_windows(workers, model):
    """The estimate and state of an episode's second window, and the program's text."""
    mesh = mesh_of(workers, model)
    theta = theta_on(mesh)
    many = ug.average(low_rank(mesh), 8, mesh=mesh, batch_size=1)
    state = many.init(KEY, theta)
    text = ""
    if model > 1:
        text = present(jax.jit(many.estimate).lower(KEY, theta, state).compile().as_text())
    layout = jax.tree.map(lambda x: x.sharding, state)
    _, state = many.estimate(KEY, theta, state)
    estimate, state = many.estimate(KEY, theta, state)
    assert jax.tree.map(lambda x: x.sharding, state) == layout  # so that nothing recompiles
    return estimate, state, text


def largest(text):
    shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", text)
    return max([1, *(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)])


@pytest.mark.parametrize(("workers", "model"), [(2, 4), (4, 2)])
def test_a_spread_theta_gives_the_numbers_of_workers_alone(workers, model):
    """And everything that is as large as theta stays spread."""
    pytest.importorskip("quax", reason="structured noise needs the extra `lowrank`")
    (estimate, state, text), (expected, expected_state, _) = (
        two_windows(workers, model),
        two_windows(8, 1),
    )
    np.testing.assert_array_equal(
        state.carried.states["drawn"], expected_state.carried.states["drawn"]
    )
    chex.assert_trees_all_close(
        numbers(estimate.grad), numbers(expected.grad), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(estimate.loss, expected.loss, rtol=1e-5)
    for k, spec in SPECS.items():
        assert estimate.grad[k].sharding.spec == spec
    assert state.carried.states["x"].sharding.spec == P("workers", None, "model")
    # No device ever holds more than its part of a matrix, and no other array is as large.
    assert largest(text) == IN * OUT // model


@functools.cache
def windows(model):
    """The gradients of two windows, of other estimators and factors, and the program's text."""
    mesh = mesh_of(8 // model, model)
    theta = theta_on(mesh)
    common = {"truncation": 2, "sigma": 0.05, "num_pairs": 1}
    estimators = {
        "pes, Gaussian": (ug.pes, ug.noise.low_rank(factors="gaussian")),
        "es_single, orthogonal": (ug.es_single, ug.noise.low_rank(factors="orthogonal")),
    }

    def both(theta, factory, law):
        one = factory(problem(mesh if model > 1 else None), **common, noise=law)
        many = ug.average(one, 8, mesh=mesh, batch_size=1)

        def window(state, _):
            estimate, state = many.estimate(KEY, theta, state)
            return state, estimate.grad

        return jax.lax.scan(window, many.init(KEY, theta), None, length=2)[1]

    def run(theta):
        return {name: both(theta, *each) for name, each in estimators.items()}

    compiled = jax.jit(run).lower(theta).compile()
    return jax.tree.map(np.asarray, compiled(theta)), present(compiled.as_text())


def test_other_factors_and_estimators_on_a_spread_theta():
    pytest.importorskip("quax", reason="structured noise needs the extra `lowrank`")
    (found, text), (expected, _) = windows(4), windows(1)
    for name, grad in expected.items():
        chex.assert_trees_all_close(found[name], grad, rtol=1e-4, atol=1e-5, custom_message=name)
        assert min(np.abs(x).max() for x in grad["w"]) > 0.01
    assert largest(text) == 2 * IN * OUT // 4  # a device's part of both windows' gradients


@pytest.mark.parametrize(("workers", "model"), [(2, 4), (4, 2)])
def test_one_all_reduce_over_the_workers(workers, model):
    """The others add up products, over ``model``."""
    pytest.importorskip("quax", reason="structured noise needs the extra `lowrank`")
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    text = two_windows(workers, model)[2]
    found = re.findall(rf" ({kinds})(?:-start)?\(.*(?:replica_groups|pairs)=(.*)", text)
    across = [kind for kind, groups in found if crosses_rows(groups, model)]
    assert across == ["all-reduce"]
    assert len(found) > 1


def crosses_rows(groups, model):
    """Whether groups of devices, in one of XLA's notations, are of several rows of the mesh."""
    if groups.startswith("mesh"):  # names of axes (jax 0.12)
        return "workers" in groups.split("]", 1)[1].split("}")[0]
    if groups.startswith("{{"):
        lists = groups[2:].split("}}")[0].split("},{")
        return any(np.ptp([int(n) // model for n in each.split(",")]) for each in lists)
    found = re.match(r"\[(.*?)\]<=\[(.*?)\](?:T\((.*?)\))?", groups)
    shape, dims, order = present(found).groups()
    shape, dims = ([int(n) for n in x.split(",")] for x in (shape, dims))
    order = [int(n) for n in order.split(",")] if order else range(len(dims))
    lists = np.arange(8).reshape(dims).transpose(order).reshape(shape)
    return bool(np.ptp(lists // model, axis=1).any())


@pytest.mark.parametrize(
    ("groups", "crossing"),
    [
        ("mesh['workers'=2,'model'=4] {'workers'}, use", True),
        ("mesh['workers'=2,'model'=4] {'model':(1)2}, use", False),
        ("{{0,4},{1,5},{2,6},{3,7}}, use", True),
        ("{{0,1},{2,3},{4,5},{6,7}}, use", False),
        ("[2,4]<=[8], use", False),
        ("[4,2]<=[2,4]T(1,0), use", True),
    ],
)
def test_the_notations_are_read(groups, crossing):
    assert crosses_rows(groups, 4) == crossing


def test_fit_keeps_theta_spread():
    """With backpropagation, and Adam's moments beside theta."""
    mesh, outer = mesh_of(2, 4), optax.adam(0.01, eps=0.01)

    def run(mesh):
        tbptt = ug.tbptt(problem(mesh), truncation=2)
        many = ug.average(tbptt, 8, mesh=mesh)
        return ug.fit(many, theta_on(mesh), outer, num_steps=3, key=KEY, steps_per_dispatch=2)

    spread, alone = run(mesh), run(None)
    chex.assert_trees_all_close(numbers(spread.theta), numbers(alone.theta), rtol=1e-3, atol=1e-5)
    for k, spec in SPECS.items():
        layout = NamedSharding(mesh, spec)
        moments: Any = spread.opt_state
        for x in (spread.theta[k], moments[0].mu[k]):
            assert x.sharding.is_equivalent_to(layout, x.ndim)
