"""Architectures of learned optimizers obey optax's contract and compute their formulas."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.helpers import raises
from unrollgrad.learned_optimizers import ARCHITECTURES, features, networks

KEY = jax.random.key(0)
SMALL = {"decays": (0.5, 0.9), "times": (3.0, 30.0), "hidden": (8, 4), "step": 0.1}
SETTINGS: dict[str, dict[str, Any]] = {
    "scheduled_sgd": {},
    "scheduled_adam": {},
    "mlp": SMALL,
    "adafactor_mlp": SMALL,
    "rnn_mlp": {**SMALL, "units": 3},
}
NETWORKS = [name for name in SETTINGS if "mlp" in name]


def architecture_of(name):
    return ARCHITECTURES[name](**SETTINGS[name])


@functools.cache
def thetas():
    """For each architecture a theta that has an effect."""

    @jax.jit
    def made():
        first = {name: architecture_of(name).init(KEY) for name in SETTINGS}
        keys = optax.tree.split_key_like(jax.random.key(1), first)
        return jax.tree.map(lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), first, keys)

    return made()


@functools.cache
def trees():
    """Weights (a kernel, a bias, a scalar, a convolution) and three gradients for them."""
    shapes = {"kernel": (4, 3), "bias": (3,), "gain": (), "conv": (2, 2, 3, 2)}
    draws = np.random.default_rng(0)

    def draw(*lead):
        return {k: draws.normal(size=(*lead, *s)).astype(np.float32) for k, s in shapes.items()}

    return draw(), draw(3)


def updates_of(optimizer, params, grads):
    """The updates and last state of several steps; as a scan, so that types must not change."""

    def step(carry, grad):
        params, state = carry
        updates, state = optimizer.update(grad, state, params)
        return (optax.apply_updates(params, updates), state), updates

    (_, state), updates = jax.lax.scan(step, (params, optimizer.init(params)), grads)
    return updates, state


def twice(optimizer, params, grads):
    """The second step's updates at fixed weights, and the state after it."""
    state = optimizer.init(params)
    _, state = optimizer.update(grads, state, params)
    return optimizer.update(grads, state, params)


W = np.ones((3, 2), np.float32)
MASK = {"kernel": True, "bias": False, "gain": True, "conv": False}
EMPTY = {"w": W, "none": np.zeros((0, 3), np.float32)}


@functools.cache
def program(name):
    """All runs of an architecture, in one program with theta and gradients as arguments."""
    architecture = architecture_of(name)

    @jax.jit
    def runs(theta, grads):
        params, optimizer = trees()[0], architecture.transform(theta)
        half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (params, grads))
        first = jax.tree.map(lambda g: g[:1], grads)

        def moved(theta, grads):
            updates, _ = updates_of(architecture.transform(theta), params, grads)
            return sum(jnp.sum(x) for x in jax.tree.leaves(updates))

        zeros = jax.tree.map(lambda g: jnp.zeros_like(g[:2]), grads)
        found = {
            "together": updates_of(optimizer, params, grads),
            "half": updates_of(optimizer, *half),
            "alone": {k: updates_of(optimizer, params[k], grads[k])[0] for k in params},
            "masked": updates_of(optax.masked(optimizer, MASK), params, first)[0],
            "slopes at zero": jax.grad(moved, argnums=(0, 1))(theta, zeros),
            "empty": twice(optimizer, EMPTY, EMPTY),
            "full": twice(optimizer, {"w": W}, {"w": W})[0],
        }
        if name in NETWORKS:  # equinox.filter_grad gives None where a leaf is an int
            params, grads = {"w": W, "count": jnp.int32(3)}, {"w": W, "count": None}
            found["without a gradient"] = twice(optimizer, params, grads)[0]
        return found

    return runs


@functools.cache
def runs(name):
    """The program's results as NumPy arrays."""
    return jax.tree.map(np.asarray, program(name)(thetas()[name], trees()[1]))


def test_all_are_tested():
    assert set(SETTINGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optax_optimizer(name):
    """The state keeps its structure and dtypes, which are equal for every theta."""
    architecture = architecture_of(name)

    def begun(key, params):
        return architecture.transform(architecture.init(key)).init(params)

    first, other = (jax.eval_shape(begun, jax.random.key(i), trees()[0]) for i in (0, 5))
    chex.assert_trees_all_equal_shapes_and_dtypes(first, other, runs(name)["together"][1])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("run", ["half", "together"])
def test_updates_have_the_weights_dtype(name, run):
    updates, state = runs(name)[run]
    dtype = jnp.bfloat16 if run == "half" else jnp.float32
    params = {k: jax.ShapeDtypeStruct(x.shape, dtype) for k, x in trees()[0].items()}
    begun = jax.eval_shape(architecture_of(name).transform(thetas()[name]).init, params)
    chex.assert_trees_all_equal_dtypes(state, begun)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {np.dtype(dtype)}
    for leaf in jax.tree.leaves(updates):
        assert all(np.any(step != 0) for step in leaf)


@pytest.mark.parametrize("name", SETTINGS)
def test_tensors_do_not_see_each_other(name):
    """All tensors go through one product; each one's update is as if it were alone."""
    found = runs(name)
    chex.assert_trees_all_close(found["together"][0], found["alone"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_masked_and_partitioned(name):
    """optax.masked takes some leaves out; None leaves stay None."""
    (params, grads), found = trees(), runs(name)
    some, whole = found["masked"], found["together"][0]
    np.testing.assert_allclose(some["kernel"][0], whole["kernel"][0], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(some["bias"][0], grads["bias"][0])
    optimizer = architecture_of(name).transform(thetas()[name])
    without = jax.eval_shape(
        lambda *x: updates_of(optimizer, *x)[0], {**params, "bias": None}, {**grads, "bias": None}
    )
    assert without["bias"] is None
    assert without["kernel"].shape == (3, 4, 3)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_weights(name):
    optimizer = architecture_of(name).transform(thetas()[name])
    params, grads = trees()
    state = jax.eval_shape(optimizer.init, params)
    with raises(ValueError, "a learned optimizer looks at the weights", "update(grads, state"):
        jax.eval_shape(optimizer.update, grads, state)


@pytest.mark.parametrize("name", ["mlp", "rnn_mlp"])
def test_the_losses_scale_does_not_matter(name):
    """It matters only a little to ``rnn_mlp``, which reads the loss's logarithm."""
    large = jax.tree.map(lambda g: 1000 * g, trees()[1])
    scaled = program(name)(thetas()[name], large)["together"][0]
    plain = runs(name)["together"][0]
    same = [
        np.allclose(a, b, rtol=1e-3, atol=1e-5)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(scaled), strict=True)
    ]
    assert all(same) == (name == "mlp")


@pytest.mark.parametrize("name", SETTINGS)
def test_derivatives_are_finite_where_gradients_are_zero(name):
    chex.assert_tree_all_finite(runs(name)["slopes at zero"])


def by_hand(theta, w, grads, step, magnitude):
    """The formula of ``mlp`` in NumPy, one weight after another."""
    decays, times = np.array(SMALL["decays"]), np.array(SMALL["times"])
    layers = jax.tree.map(np.asarray, theta["layers"])
    averages = np.zeros((*w.shape, len(decays)))
    moves = []
    for t, g in enumerate(grads):
        averages = decays * averages + (1 - decays) * g[..., None]
        seen = np.concatenate([g[..., None], w[..., None], averages], axis=-1)
        seen = seen / np.sqrt(np.mean(seen**2, axis=(0, 1)))
        move = np.zeros(w.shape)
        for place in np.ndindex(w.shape):
            x = np.concatenate([seen[place], np.tanh(t / times - 1)])
            for layer in layers[:-1]:
                x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
            direction, log = x @ layers[-1]["kernel"] + layers[-1]["bias"]
            move[place] = -step * direction * np.exp(magnitude * log)
        moves.append(move)
        w = w + move
    return moves


def test_mlp_is_its_formula():
    """Runs eagerly, as a user would try it."""
    optimizer: Any = ug.learned_optimizers.mlp(**SMALL, magnitude=0.5).transform(thetas()["mlp"])
    params, grads = trees()
    w, gs = jnp.asarray(params["kernel"]), grads["kernel"]
    state, found = optimizer.init(w), []
    for g in gs:
        move, state = optimizer.update(jnp.asarray(g), state, w)
        found.append(move)
        w = w + move
    expected = by_hand(thetas()["mlp"], params["kernel"], gs, 0.1, 0.5)
    np.testing.assert_allclose(np.stack(found), expected, rtol=1e-3, atol=1e-5)
    assert int(state.count) == 3


def test_a_schedule_that_is_constant_is_optax():
    @jax.jit
    def both(params, grads):
        return [
            (
                updates_of(learned.transform(learned.init(KEY)), params, grads)[0],
                updates_of(plain, params, grads)[0],
            )
            for learned, plain in [
                (ug.learned_optimizers.scheduled_adam(rate=0.02), optax.adam(0.02)),
                (ug.learned_optimizers.scheduled_sgd(rate=0.02), optax.sgd(0.02, momentum=0.9)),
            ]
        ]

    for found, expected in both(*trees()):
        chex.assert_trees_all_close(found, expected, rtol=1e-3)


def test_a_schedule_between_its_knots():
    rule = ug.learned_optimizers.scheduled_sgd(knots=(0, 3, 15), momentum=1e-9)
    log_rates = np.log(np.array([1.0, 0.25, 0.0625], np.float32))
    theta = jax.jit(rule.init)(KEY) | {"log_rate": log_rates}
    w = np.ones(1, np.float32)
    found = jax.jit(lambda theta: updates_of(rule.transform(theta), w, np.ones((30, 1)))[0])(theta)
    rates = np.negative(found)[:, 0]
    np.testing.assert_allclose(rates[[0, 1, 3, 7, 15, 29]], [1, 0.5, 0.25, 0.125] + [0.0625] * 2)


@pytest.mark.parametrize("knots", [(), (3, 3), (-1, 4)])
def test_knots_that_do_not_increase(knots):
    for make in (ug.learned_optimizers.scheduled_sgd, ug.learned_optimizers.scheduled_adam):
        with raises(ValueError, "`knots` must be steps >= 0 that increase"):
            make(knots=knots)


def test_hyperparameters_without_a_logarithm():
    sgd, adam = ug.learned_optimizers.scheduled_sgd, ug.learned_optimizers.scheduled_adam
    for make, name, value in (
        (sgd, "momentum", 0.0),
        (sgd, "momentum", 1.0),
        (adam, "b1", 0.0),
        (adam, "b2", 1.0),
        (adam, "rate", 0.0),
    ):
        arguments: dict[str, Any] = {name: value}
        with raises(ValueError, f"`{name}` must", f"got {value}"):
            make(**arguments).init(KEY)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_to_update(name):
    """Weights may have no leaf, or a leaf of size 0."""
    optimizer = architecture_of(name).transform(thetas()[name])
    assert jax.eval_shape(lambda: twice(optimizer, {}, {})[0]) == {}
    (updates, state), alone = runs(name)["empty"], runs(name)["full"]
    np.testing.assert_allclose(updates["w"], alone["w"], rtol=1e-4)
    assert updates["none"].shape == (0, 3)
    chex.assert_tree_all_finite(state)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_leaf_without_a_gradient(name):
    updates, alone = runs(name)["without a gradient"], runs(name)["full"]
    assert updates["count"] is None
    np.testing.assert_allclose(updates["w"], alone["w"], rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_complex_weights(name):
    init = architecture_of(name).transform(thetas()[name]).init
    with raises(TypeError, "params['w'] is complex64", "optax.masked"):
        jax.eval_shape(init, {"w": jax.ShapeDtypeStruct((2,), jnp.complex64)})


@pytest.mark.parametrize("name", SETTINGS)
def test_wide_weights(name):
    """With float64 enabled, float64 weights move in float64 although theta is float32."""
    with jax.enable_x64(True):
        architecture = architecture_of(name)
        theta = jax.eval_shape(architecture.init, KEY)
        assert {x.dtype for x in jax.tree.leaves(theta)} == {np.dtype(np.float32)}
        w = jax.ShapeDtypeStruct((2, 3), jnp.float64)

        def moves(theta, w):
            return twice(architecture.transform(theta), w, w)[0]

        assert jax.eval_shape(moves, theta, w).dtype == np.float64


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_without_hidden_units(name):
    with raises(ValueError, "`hidden` must be units of at least one layer"):
        ARCHITECTURES[name](hidden=())


def test_factored_squares_of_rank_one_are_exact():
    rows, columns = np.array([1.0, 2.0, 0.5], np.float32), np.array([3.0, 0.1], np.float32)
    grad = np.outer(rows, columns)

    @jax.jit
    def roots(grad):
        zeros = features.factored_zeros(grad.shape, 1, grad.dtype)
        return features.factored_rsqrt(features.factored_averages(zeros, grad, (0.0,)), grad.shape)

    both, of_rows, of_columns = roots(grad)
    np.testing.assert_allclose(both[..., 0], 1 / grad, rtol=1e-4)
    assert of_rows.shape == of_columns.shape == (3, 2, 1)
    size = np.sqrt(np.mean(columns**2))
    np.testing.assert_allclose(np.asarray(of_rows)[:, 0, 0] * size, 1 / rows, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(roots(rows)[0])[:, 0], 1 / rows, rtol=1e-4)


def test_the_recurrent_unit_is_that_of_flax():
    from flax import nnx

    gru = jax.tree.map(np.asarray, jax.jit(networks.init_gru, static_argnums=(1, 2))(KEY, 3, 2))
    gru["bias"] = np.arange(6, dtype=np.float32) / 10
    draws = np.random.default_rng(0)
    x, memory = (draws.normal(size=(4, n)).astype(np.float32) for n in (3, 2))
    # flax's z is the share that stays; its gates are in the order r, z, n.
    z, r, n = np.split(gru["kernel"], 3, axis=1)
    b_z, b_r, b_n = np.split(gru["bias"], 3)

    @jax.jit
    def both(x, memory):
        cell = nnx.GRUCell(3, 2, rngs=nnx.Rngs(0))
        cell.dense_i.kernel[...] = jnp.concatenate([r[:3], -z[:3], n[:3]], axis=1)
        cell.dense_h.kernel[...] = jnp.concatenate([r[3:], -z[3:], n[3:]], axis=1)
        cell.dense_i.bias[...] = jnp.concatenate([b_r, -b_z, b_n])
        return networks.apply_gru(gru, x, memory), cell(memory, x)[0]

    found, expected = both(x, memory)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_can_be_trained(name):
    """A few gradient steps on theta through twenty inner steps lower the final loss."""
    architecture, theta = architecture_of(name), thetas()[name]
    problem = ug.training_problem(
        loss=lambda theta, w, batch, key: 0.5 * jnp.sum((w["w"] - batch) ** 2),
        init_params=lambda key: {"w": jnp.zeros((2, 3))},
        optimizer=lambda theta, t: architecture.transform(theta),
        sample_batch=lambda key: jnp.full((2, 3), 0.5),
        horizon=20,
    )
    estimator = ug.bptt(problem)
    outer = optax.adam(0.03)

    def step(carry, key):
        theta, state = carry
        estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        updates, state = outer.update(estimate.grad, state)
        return (optax.apply_updates(theta, updates), state), estimate.loss

    @jax.jit
    def losses(theta):
        keys = jax.random.split(KEY, 100)
        return jax.lax.scan(step, (theta, outer.init(theta)), keys)[1]

    found = np.asarray(losses(theta))
    assert found[-1] < 0.5 * found[0]
