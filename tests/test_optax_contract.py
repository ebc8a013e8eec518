"""What optax asks of its own optimizers, asked of ours: ``apo``, ``bloop`` and the learned ones.

The cases are those of optax's contract tests: dtypes, extra arguments, ``map_params``, abstract
weights, Python floats, leaves without numbers, wrappers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug

LEARNED = ("scheduled_sgd", "scheduled_adam", "mlp", "adafactor_mlp", "rnn_mlp")
APO = {
    "apo.learning_rate": lambda: ug.apo.learning_rate(optax.adam, 1e-2, lambda_fsd=0),
    "apo.preconditioner": lambda: ug.apo.preconditioner(1e-2, lambda_fsd=0, lambda_wsd=0.1),
}


def with_itself_as_auxiliary():
    """``bilevel.bloop`` whose auxiliary gradient is the main one."""
    bloop = ug.bilevel.bloop(0.5)

    def update(updates, state, params=None, **extra_args):
        return bloop.update(updates, state, params, auxiliary=updates, **extra_args)

    return optax.GradientTransformationExtraArgs(bloop.init, update)


BLOOP = {"bilevel.bloop": with_itself_as_auxiliary}


def learned(name):
    small = {"hidden": (4,)} if name.endswith("mlp") else {}
    architecture = getattr(ug.learned_optimizers, name)(**small)
    return architecture.transform(architecture.init(jax.random.key(0)))


def make(name) -> Any:
    ours = {**APO, **BLOOP}
    return ours[name]() if name in ours else learned(name)


def loss(params, batch):
    return sum((jnp.sum(jnp.asarray(x, jnp.float32) ** 2) for x in jax.tree.leaves(params)), 0.0)


GIVEN = {"loss": loss, "batch": jnp.zeros(())}
every = pytest.mark.parametrize("name", [*APO, *BLOOP, *LEARNED])


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_shapes_and_extra_arguments(name, dtype):
    """Abstractly: updates are like the gradients, states like those of ``init`` (also for
    ``lax.cond``, which is stricter), unknown arguments are ignored."""
    with jax.enable_x64(dtype == "float64"):
        abstract_call(name, dtype)


def abstract_call(name, dtype):
    params = {"w": jax.ShapeDtypeStruct((2, 3), dtype), "b": jax.ShapeDtypeStruct((3,), dtype)}
    optimizer = make(name)
    state = jax.eval_shape(optimizer.init, params)
    update = optax.with_extra_args_support(optimizer).update

    def call(grads, state, params):
        return update(grads, state, params, **GIVEN, unknown=jnp.ones(2))

    updates, after = jax.eval_shape(call, params, state, params)
    assert updates == params
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    jax.eval_shape(lambda g, s, p: optimizer.update(g, s, p, **GIVEN), params, state, params)

    def sometimes(now, grads, state, params):
        return jax.lax.cond(now, lambda: call(grads, state, params), lambda: (params, state))

    jax.eval_shape(sometimes, True, params, state, params)
    every_fourth = optax.MultiSteps(optimizer, 4)
    kept = jax.eval_shape(every_fourth.init, params)
    updates, after = jax.eval_shape(
        lambda g, s, p: every_fourth.update(g, s, p, **GIVEN), params, kept, params
    )
    assert updates == params
    assert jax.tree.structure(after) == jax.tree.structure(kept)


@every
def test_abstract_weights_and_map_params(name):
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    optimizer = make(name)
    state = optimizer.init(params)
    abstract = optimizer.init(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    )
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    doubled = optax.tree.map_params(optimizer, lambda x: x + 1, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    if name in LEARNED:  # the factors of a preconditioner are not like the weights
        specs = optax.tree.map_params(
            optimizer,
            lambda x, spec: spec,
            state,
            {"w": "W", "b": "B"},
            transform_non_params=lambda x: None,
        )
        assert set(jax.tree.leaves(specs)) <= {"W", "B"}


@every
def test_leaves_without_numbers_python_floats_and_wrappers(name):
    optimizer = make(name)

    def updated(optimizer, params):
        state = optimizer.init(params)
        with jax.disable_jit():
            return optax.with_extra_args_support(optimizer).update(params, state, params, **GIVEN)

    for params in ({}, {"a": jnp.ones(2), "e": jnp.zeros((0, 3))}, {"a": 1.0}):
        found, _ = updated(optimizer, params)
        assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, params)
    steps, params = optax.MultiSteps(optimizer, 2), {"a": jnp.ones(2)}
    with jax.disable_jit():
        found, _ = steps.update(params, steps.init(params), params, **GIVEN)
    np.testing.assert_array_equal(found["a"], 0)
    if name in LEARNED:
        params = {"a": jnp.ones(2), "b": jnp.ones(3)}
        masked, _ = updated(optax.masked(optimizer, {"a": True, "b": False}), params)
        np.testing.assert_array_equal(masked["b"], 1)
        both = optax.partition({0: optimizer, 1: optax.sgd(1.0)}, {"a": 0, "b": 1})
        np.testing.assert_array_equal(updated(both, params)[0]["b"], -1)


def test_injected_hyperparameters():
    injected = optax.inject_hyperparams(ug.apo.preconditioner, static_args="meta_interval")
    optimizer = injected(1e-2, lambda_fsd=0.0, lambda_wsd=0.1, meta_interval=2)
    params = [jnp.ones((2, 3))]
    state = optimizer.init(params)
    with jax.disable_jit():
        updates, _ = optax.with_extra_args_support(optimizer).update(params, state, params, **GIVEN)
    assert np.isfinite(jax.tree.leaves(updates)[0]).all()


@every
@pytest.mark.parametrize("spec", [("x", None), (None, "y"), ("x", "y")])
def test_explicit_shardings(name, spec):
    """Updates have the gradients' sharding where it is part of the type; only traced."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    w = jax.ShapeDtypeStruct((4, 8), jnp.float32, sharding=sharding)

    def updates(w):
        one = make(name)
        return one.update(w, one.init(w), w, **GIVEN)[0]

    with jax.set_mesh(mesh):
        found = jax.eval_shape(jax.jit(updates), w)
    assert found.shape == w.shape
    assert found.sharding.spec == sharding.spec
