"""Architectures of learned optimizers: optax's contract, and what they compute."""

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
SETTINGS = {
    "scheduled_sgd": {},
    "scheduled_adam": {},
    "mlp": SMALL,
    "adafactor_mlp": SMALL,
    "rnn_mlp": {**SMALL, "units": 3},
}
NETWORKS = [name for name in SETTINGS if "mlp" in name]


def build(name):
    """The architecture, and a theta that does something."""
    architecture = ARCHITECTURES[name](**SETTINGS[name])
    theta = architecture.init(KEY)
    keys = optax.tree.split_key_like(jax.random.key(1), theta)
    return architecture, jax.tree.map(
        lambda x, k: x + 0.1 * jax.random.normal(k, x.shape), theta, keys
    )


def trees(scale=1.0):
    """Weights and three gradients of them: a kernel, a bias, a scalar, a convolution."""
    shapes = {"kernel": (4, 3), "bias": (3,), "gain": (), "conv": (2, 2, 3, 2)}
    draw = lambda seed: {  # noqa: E731
        name: jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return draw(0), [jax.tree.map(lambda g: scale * g, draw(i)) for i in (1, 2, 3)]


def updates_of(optimizer, params, grads):
    """The updates of several steps, and the last state."""
    state, found = optimizer.init(params), []
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
        found.append(updates)
        params = optax.apply_updates(params, updates)
    return found, state


def test_all_are_tested():
    assert set(SETTINGS) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optax_optimizer(name):
    """The state keeps its structure and dtypes in a scan, and is the same for every theta."""
    architecture, theta = build(name)
    params, grads = trees()
    eager, _ = updates_of(architecture.transform(theta), params, grads)

    @jax.jit
    def run(theta, params):
        optimizer = architecture.transform(theta)

        def step(carry, grad):
            params, state = carry
            updates, state = optimizer.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), updates

        stacked = jax.tree.map(lambda *g: jnp.stack(g), *grads)
        return jax.lax.scan(step, (params, optimizer.init(params)), stacked)[1]

    scanned = run(theta, params)
    for i, updates in enumerate(eager):
        for leaf, other in zip(jax.tree.leaves(updates), jax.tree.leaves(scanned), strict=True):
            np.testing.assert_allclose(leaf, other[i], rtol=1e-5, atol=1e-6)
    other = architecture.transform(architecture.init(jax.random.key(5)))
    assert jax.tree.structure(other.init(params)) == jax.tree.structure(
        architecture.transform(theta).init(params)
    )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_updates_have_the_weights_dtype(name, dtype):
    architecture, theta = build(name)
    params, grads = jax.tree.map(lambda x: x.astype(dtype), trees())
    optimizer = architecture.transform(theta)
    found, state = updates_of(optimizer, params, grads)
    dtypes = [x.dtype for x in jax.tree.leaves(state)]
    assert dtypes == [x.dtype for x in jax.tree.leaves(optimizer.init(params))]
    for updates in found:
        assert {x.dtype for x in jax.tree.leaves(updates)} == {np.dtype(dtype)}
        assert all(bool(jnp.any(x != 0)) for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", SETTINGS)
def test_tensors_do_not_see_each_other(name):
    """All go through one product; each moves as if it were alone."""
    architecture, theta = build(name)
    optimizer = architecture.transform(theta)
    params, grads = trees()
    together, _ = updates_of(optimizer, params, grads)
    for leaf in params:
        alone, _ = updates_of(optimizer, params[leaf], [g[leaf] for g in grads])
        for both, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(both[leaf], one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_masked_and_partitioned(name):
    """optax.masked takes some leaves out; None leaves stay None."""
    architecture, theta = build(name)
    optimizer = architecture.transform(theta)
    params, grads = trees()
    mask = {"kernel": True, "bias": False, "gain": True, "conv": False}
    some, _ = updates_of(optax.masked(optimizer, mask), params, grads[:1])
    whole, _ = updates_of(optimizer, params, grads[:1])
    np.testing.assert_allclose(some[0]["kernel"], whole[0]["kernel"], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(some[0]["bias"], grads[0]["bias"])
    without, _ = updates_of(optimizer, {**params, "bias": None}, [{**grads[0], "bias": None}])
    assert without[0]["bias"] is None


@pytest.mark.parametrize("name", NETWORKS)
def test_without_weights(name):
    architecture, theta = build(name)
    optimizer = architecture.transform(theta)
    params, grads = trees()
    with raises(ValueError, "a learned optimizer looks at the weights", "update(grads, state"):
        optimizer.update(grads[0], optimizer.init(params))


@pytest.mark.parametrize("name", ["mlp", "rnn_mlp"])
def test_the_losses_scale_does_not_matter(name):
    """To ``rnn_mlp`` only a little: it reads the logarithm."""
    architecture, theta = build(name)
    params, grads = trees()
    plain, _ = updates_of(architecture.transform(theta), params, grads)
    scaled, _ = updates_of(architecture.transform(theta), params, trees(1000.0)[1])
    same = [
        np.allclose(a, b, rtol=1e-3, atol=1e-5)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(scaled), strict=True)
    ]
    assert all(same) == (name == "mlp")


@pytest.mark.parametrize("name", SETTINGS)
def test_derivatives_are_finite_where_gradients_are_zero(name):
    architecture, theta = build(name)
    params, grads = trees()
    grads = [jax.tree.map(jnp.zeros_like, grads[0])] * 2

    def moved(theta, grads):
        found, _ = updates_of(architecture.transform(theta), params, grads)
        return sum(jnp.sum(x) for x in jax.tree.leaves(found))

    slopes = jax.grad(moved, argnums=(0, 1))(theta, grads)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(slopes))


def by_hand(theta, w, grads, step, magnitude):
    """The formula of ``mlp``, one weight after another, in numpy."""
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
    architecture = ug.learned_optimizers.mlp(**SMALL, magnitude=0.5)
    _, theta = build("mlp")
    params, grads = trees()
    w, gs = params["kernel"], [g["kernel"] for g in grads]
    found, state = updates_of(architecture.transform(theta), w, gs)
    expected = by_hand(theta, np.asarray(w), [np.asarray(g) for g in gs], 0.1, 0.5)
    np.testing.assert_allclose(np.stack(found), expected, rtol=1e-3, atol=1e-5)
    assert int(state.count) == 3


def test_a_schedule_that_is_constant_is_optax():
    params, grads = trees()
    for learned, plain in [
        (ug.learned_optimizers.scheduled_adam(rate=0.02), optax.adam(0.02)),
        (ug.learned_optimizers.scheduled_sgd(rate=0.02), optax.sgd(0.02, momentum=0.9)),
    ]:
        found, _ = updates_of(learned.transform(learned.init(KEY)), params, grads)
        expected, _ = updates_of(plain, params, grads)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3)


def test_a_schedule_between_its_knots():
    rule = ug.learned_optimizers.scheduled_sgd(knots=(0, 3, 15), momentum=1e-9)
    theta = rule.init(KEY) | {"log_rate": jnp.log(jnp.array([1.0, 0.25, 0.0625]))}
    w = jnp.ones(1)
    found, _ = updates_of(rule.transform(theta), w, [w] * 30)
    rates = -np.concatenate(found)
    np.testing.assert_allclose(rates[[0, 1, 3, 7, 15, 29]], [1, 0.5, 0.25, 0.125] + [0.0625] * 2)


@pytest.mark.parametrize("knots", [(), (3, 3), (-1, 4)])
def test_knots_that_do_not_increase(knots):
    for make in (ug.learned_optimizers.scheduled_sgd, ug.learned_optimizers.scheduled_adam):
        with raises(ValueError, "`knots` must be steps >= 0 that increase"):
            make(knots=knots)


def test_hyperparameters_without_a_logarithm():
    sgd, adam = ug.learned_optimizers.scheduled_sgd, ug.learned_optimizers.scheduled_adam
    for make, name, value in [
        (sgd, "momentum", 0.0),
        (sgd, "momentum", 1.0),
        (adam, "b1", 0.0),
        (adam, "b2", 1.0),
        (adam, "rate", 0.0),
    ]:
        with raises(ValueError, f"`{name}` must", f"got {value}"):
            make(**{name: value}).init(KEY)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_to_update(name):
    """No leaf, a leaf without numbers, a leaf without a gradient (equinox)."""
    architecture, theta = build(name)
    optimizer = architecture.transform(theta)
    updates_of(optimizer, {}, [{}])
    w = jnp.ones((3, 2))
    empty = {"w": w, "none": jnp.zeros((0, 3))}
    found, state = updates_of(optimizer, empty, [empty] * 2)
    alone, _ = updates_of(optimizer, {"w": w}, [{"w": w}] * 2)
    np.testing.assert_allclose(found[1]["w"], alone[1]["w"], rtol=1e-4)
    assert found[1]["none"].shape == (0, 3)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_leaf_without_a_gradient(name):
    """equinox.filter_grad gives None where a leaf is an int."""
    architecture, theta = build(name)
    optimizer = architecture.transform(theta)
    params = {"w": jnp.ones((3, 2)), "count": jnp.int32(3)}
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update({"w": params["w"], "count": None}, state, params)
    assert updates["count"] is None
    alone = {"w": params["w"]}
    own = optimizer.init(alone)
    for _ in range(2):
        expected, own = optimizer.update(alone, own, alone)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_complex_weights(name):
    architecture, theta = build(name)
    with raises(TypeError, "params['w'] is complex64", "optax.masked"):
        architecture.transform(theta).init({"w": jnp.ones(2, jnp.complex64)})


@pytest.mark.parametrize("name", SETTINGS)
def test_wide_weights(name):
    """float64 weights move in float64, with a float32 theta, in x64 mode and in none."""
    with jax.enable_x64(True):
        architecture = ARCHITECTURES[name](**SETTINGS[name])
        theta = architecture.init(KEY)
        assert {x.dtype for x in jax.tree.leaves(theta)} == {np.dtype(np.float32)}
        w = jnp.ones((2, 3), jnp.float64)
        found, _ = updates_of(architecture.transform(theta), w, [w, w])
        assert found[1].dtype == np.float64


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_without_hidden_units(name):
    with raises(ValueError, "`hidden` must be units of at least one layer"):
        ARCHITECTURES[name](hidden=())


def test_factored_squares_of_rank_one_are_exact():
    rows, columns = jnp.array([1.0, 2.0, 0.5]), jnp.array([3.0, 0.1])
    grad = jnp.outer(rows, columns)
    found = features.factored_averages(features.factored_zeros((3, 2), 1, grad.dtype), grad, (0.0,))
    both, of_rows, of_columns = features.factored_rsqrt(found, (3, 2))
    np.testing.assert_allclose(both[..., 0], 1 / grad, rtol=1e-4)
    assert of_rows.shape == of_columns.shape == (3, 2, 1)
    np.testing.assert_allclose(of_rows[:, 0, 0] * np.sqrt(np.mean(columns**2)), 1 / rows, rtol=1e-4)
    flat = features.factored_averages(features.factored_zeros((3,), 1, grad.dtype), rows, (0.0,))
    np.testing.assert_allclose(features.factored_rsqrt(flat, (3,))[0][:, 0], 1 / rows, rtol=1e-4)


def test_the_recurrent_unit_is_that_of_flax():
    from flax import nnx

    gru = networks.init_gru(KEY, 3, 2)
    gru["bias"] = jnp.arange(6) / 10
    x, memory = jax.random.normal(KEY, (4, 3)), jax.random.normal(jax.random.key(1), (4, 2))
    cell = nnx.GRUCell(3, 2, rngs=nnx.Rngs(0))
    # flax calls z what stays: its gates are in the order r, z, n.
    z, r, n = jnp.split(gru["kernel"], 3, axis=1)
    cell.dense_i.kernel[...] = jnp.concatenate([r[:3], -z[:3], n[:3]], axis=1)
    cell.dense_h.kernel[...] = jnp.concatenate([r[3:], -z[3:], n[3:]], axis=1)
    b_z, b_r, b_n = jnp.split(gru["bias"], 3)
    cell.dense_i.bias[...] = jnp.concatenate([b_r, -b_z, b_n])
    expected, _ = cell(memory, x)
    np.testing.assert_allclose(networks.apply_gru(gru, x, memory), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SETTINGS)
def test_it_can_be_trained(name):
    """A few gradient steps on theta through twenty inner steps: the loss at the end falls."""
    architecture, theta = build(name)
    problem = ug.training_problem(
        loss=lambda theta, w, batch, key: 0.5 * jnp.sum((w["w"] - batch) ** 2),
        init_params=lambda key: {"w": jnp.zeros((2, 3))},
        optimizer=lambda theta, t: architecture.transform(theta),
        sample_batch=lambda key: jnp.full((2, 3), 0.5),
        horizon=20,
    )
    estimator = ug.bptt(problem)
    outer = optax.adam(0.03)

    @jax.jit
    def step(carry, key):
        theta, state = carry
        estimate, _ = estimator.estimate(key, theta, estimator.init(key, theta))
        updates, state = outer.update(estimate.grad, state)
        return (optax.apply_updates(theta, updates), state), estimate.loss

    _, losses = jax.lax.scan(step, (theta, outer.init(theta)), jax.random.split(KEY, 100))
    assert losses[-1] < 0.5 * losses[0]
