"""The contract of estimators, the cost, and the messages of self-tuning networks.

One problem has everything that theirs may have: params and theta are trees with leaves of float64,
float32 and bfloat16, the loss is split, sigma is tuned, and the rows of a batch have their own
perturbations. A row costs three programs: ``init`` and ``estimate`` alone, and both over seeds with
data that are spread over four devices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests import endless
from tests.helpers import mistyped, numbers, raises, types

KEY = endless.KEY
ROWS = 16
both = pytest.mark.parametrize("name", ["delta_stn", "stn"])


def init_params(key):
    return {
        "w": 0.1 * jax.random.normal(key, (3, 2), jnp.float32),
        "b": (jnp.zeros((), jnp.float64),),
        "half": jnp.ones(2, jnp.bfloat16),
    }


def predict(theta, params, batch, key):
    x = batch["x"] * jnp.exp(theta["scale"][0].astype(jnp.float32))
    x = x * jax.random.bernoulli(key, 0.9, x.shape)
    return (x @ params["w"]) @ params["half"].astype(jnp.float32) + params["b"][0], params


def of_outputs(theta, outputs, batch, key):
    y, params = outputs
    size = sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))
    return jnp.mean((y - batch["y"][0] - theta["shift"][0]) ** 2) + jnp.exp(theta["decay"]) * size


def build(name, data, **changes):
    def meta_loss(theta, params, key):
        return jnp.mean((predict(theta, params, data, key)[0] - data["y"][0]) ** 2)

    settings = {
        "loss": ug.stn.SplitLoss(predict, of_outputs),
        "meta_loss": meta_loss,
        "init_params": init_params,
        "sample_batch": lambda key: data,
        "inner_optimizer": optax.sgd(1e-2, momentum=0.9),
        "response_optimizer": optax.adam(1e-2),
        "sigma": {"decay": 0.5, "scale": 0.1, "shift": 0.2},
        "train_steps": 2,
        "num_perturbations": ROWS,
        **changes,
    }
    return getattr(ug.stn, name)(**settings)


@functools.cache
def ran(name) -> endless.Ran:
    with jax.enable_x64(True):
        return endless.run(functools.partial(build, name), lambda x: x, endless.rows(ROWS))


@both
def test_structure_dtypes_and_one_program(name):
    row = ran(name)
    endless.check_form(row)
    assert types(row.estimates[0].grad) == types(row.theta)
    assert any(np.any(x) for x in jax.tree.leaves(numbers(row.estimates[1].grad)))
    carried = row.states[-1].carried
    assert {k: jax.tree.leaves(x)[0].dtype for k, x in carried.params.items()} == {
        "w": jnp.float32,
        "b": np.float64,
        "half": jnp.bfloat16,
    }
    assert carried.response["w"].weights.dtype == jnp.float32
    assert carried.response["half"].dtype == jnp.float32


@both
def test_a_saved_state_continues_bit_for_bit(name):
    """Whatever the key of the call: all draws come from the key of ``init``."""
    endless.check_goes_on(ran(name))


@both
def test_over_seeds_and_spread_data(name):
    row = ran(name)
    endless.check_seeds_and_devices(row)
    draws = numbers(row.seeds[1].carried.params["w"])
    assert np.any(draws[0] != draws[1])  # seeds differ


@both
def test_sigma_is_tuned_and_shown(name):
    row = ran(name)
    sigmas = np.array([out.info.sigma for out in row.estimates])
    np.testing.assert_allclose(sigmas[0], [0.5, 0.1, 0.1, 0.1, 0.2], rtol=1e-5)
    assert np.all(sigmas[1:] != sigmas[:-1])
    assert np.all(sigmas > 0)
    np.testing.assert_allclose(row.estimates[0].info.theta, [-1, 0, 0, 0, 0.1], rtol=1e-6)
    assert int(row.estimates[0].info.inner_steps) == 2


WIDTH, BATCH = 256, 128


def deep_loss(split):
    def outputs(theta, params, batch, key):
        x = batch[0]
        for i, layer in enumerate(params):
            x = x @ layer["w"] + layer["b"]
            x = jax.nn.relu(x) * jnp.exp(theta["gain"]) if i < 2 else x
        return x, params

    def loss(theta, out, batch, key):
        size = sum(jnp.sum(p["w"] ** 2) for p in out[1])
        fit = optax.softmax_cross_entropy_with_integer_labels(out[0], batch[1])
        return jnp.mean(fit) + jnp.exp(theta["decay"]) * size

    whole = ug.stn.SplitLoss(outputs, loss)
    return whole if split else lambda *args: whole(*args)


def test_the_cost_of_a_training_step():
    """Counted by XLA: operations of a step over a plain step's, and memory over the weights'.

    The validation loss reads one number and costs nothing; XLA counts a scan's body once.
    """
    theta = {"gain": jnp.zeros(()), "decay": jnp.float32(-8.0)}
    optimizer = optax.sgd(0.1)

    def init_params(key):
        return [{"w": jnp.ones((WIDTH, WIDTH)) / WIDTH, "b": jnp.zeros(WIDTH)} for _ in range(3)]

    def sample_batch(key):
        return jnp.ones((BATCH, WIDTH)), jnp.zeros(BATCH, jnp.int32)

    params = init_params(KEY)
    weights = sum(x.nbytes for x in jax.tree.leaves(params))

    def plain(key, theta, carry):
        def step(params, key):
            batch = sample_batch(key)
            value, grad = jax.value_and_grad(lambda p: deep_loss(False)(theta, p, batch, key))(
                params
            )
            updates, _ = optimizer.update(grad, optimizer.init(params), params)
            return optax.apply_updates(params, updates), value

        return jax.lax.scan(step, carry, jax.random.split(key, 5))

    def cost(function, carry):
        compiled = jax.jit(function).lower(KEY, theta, carry).compile()
        memory: Any = compiled.memory_analysis()
        return compiled.cost_analysis()["flops"], memory.temp_size_in_bytes

    operations, temporaries = cost(plain, params)
    limits = {("delta_stn", False): 2.2, ("delta_stn", True): 2.8, ("stn", False): 1.3}
    for (name, split), limit in limits.items():
        estimator = getattr(ug.stn, name)(
            loss=deep_loss(split),
            meta_loss=lambda theta, params, key: params[0]["b"][0],
            init_params=init_params,
            sample_batch=sample_batch,
            inner_optimizer=optimizer,
        )
        state = estimator.init(KEY, theta)
        found = cost(estimator.estimate, state)
        kept = sum(
            x.nbytes for x in jax.tree.leaves((state.carried.params, state.carried.response))
        )
        print(
            f"{name}, split {split}: {found[0] / operations:.2f} of the operations, "
            f"{kept / weights:.2f} weights, {found[1] / temporaries:.2f} of the temporaries"
        )
        assert found[0] < limit * operations
        assert kept < 2.5 * weights
        assert found[1] < 2.5 * temporaries


@both
def test_an_optimizer_that_needs_the_loss(name):
    """A step of Polyak is value / slope; from 2 towards 0 of x^2 that is to half of it."""
    estimator = getattr(ug.stn, name)(
        loss=lambda theta, w, batch, key: w**2,
        meta_loss=lambda theta, w, key: w,
        init_params=lambda key: jnp.float32(2.0),
        sample_batch=lambda key: None,
        inner_optimizer=optax.polyak_sgd(),
        train_steps=1,
        tune_sigma=False,
    )
    theta = jnp.float32(0.0)
    _, state = jax.jit(estimator.estimate)(KEY, theta, estimator.init(KEY, theta))
    assert float(state.carried.params) == pytest.approx(1.0)


def test_what_a_split_loss_is():
    """Its outputs move along their Jacobian; a loss that is not split moves with the weights."""
    loss = ug.stn.SplitLoss(
        lambda theta, w, batch, key: {"y": jnp.sin(w), "n": jnp.int32(3)},
        lambda theta, out, batch, key: jnp.sum((out["y"] - theta) ** 2) * out["n"],
    )
    w, move = jnp.array([0.3, 1.2]), jnp.array([0.5, -0.4])
    linear = 3 * np.sum((np.sin(w) + np.cos(w) * move - 0.1) ** 2)
    found = ug.stn.losses.moved_loss(loss, jnp.array(0.1), (w, move), None, KEY)
    np.testing.assert_allclose(found, linear, rtol=1e-6)
    whole = ug.stn.losses.moved_loss(
        lambda *args: loss(*args), jnp.array(0.1), (w, move), None, KEY
    )
    np.testing.assert_allclose(whole, 3 * np.sum((np.sin(w + move) - 0.1) ** 2), rtol=1e-6)
    assert abs(whole - linear) > 1e-2


@pytest.mark.parametrize(
    ("shape", "axis", "outputs"),
    [
        ((5, 4), -1, (1, 4)),  # dense, recurrent, embedding
        ((4, 5), 0, (4, 1)),
        ((3, 3, 2, 4), -1, (1, 1, 1, 4)),  # a convolution
        ((6, 2, 3), (-2, -1), (1, 2, 3)),  # heads
    ],
)
def test_scaled_rows_of_every_layer(shape, axis, outputs):
    law = ug.stn.scaled_rows(axis, initial_std=1.0)
    theta = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    offset = {"a": jnp.array([0.5, -1.0]), "b": jnp.float32(2.0)}

    @jax.jit
    def both(key):
        weights = law.init(key, {"w": jnp.zeros(shape)}, theta)
        return weights["w"], law.apply(weights, offset)["w"]

    weights, moved = both(KEY)
    assert weights.weights.shape == shape
    assert weights.scales.shape == (*outputs, 3)
    scales = np.asarray(weights.scales) @ np.array([0.5, -1.0, 2.0])
    np.testing.assert_allclose(moved, np.asarray(weights.weights) * scales, rtol=1e-5)
    inputs = np.prod(shape) / np.prod(outputs)
    assert 0.5 < np.std(weights.weights) * np.sqrt(inputs) < 2  # W is zero


def test_messages():
    data, theta = endless.rows(ROWS), jnp_theta()

    def made(name="delta_stn", **changes):
        small = {"w": np.zeros((3, 2), np.float32), "half": np.zeros(2, np.float32)}
        begin = {"init_params": lambda key: small | {"b": (np.float32(0),)}}
        return build(name, data, **begin, **changes)

    def begun(**changes):
        return jax.eval_shape(made(**changes).init, KEY, theta)

    with raises(ValueError, "`num_perturbations`=5", "batch['x']"):
        jax.eval_shape(made(num_perturbations=5).estimate, KEY, theta, begun())
    own = jax.custom_vjp(lambda params: params["half"][0].astype(jnp.float32))
    own.defvjp(lambda params: (own(params), params), lambda params, g: (params,))
    with raises(NotImplementedError, "custom_vjp", "`num_perturbations=1`", "ug.stn.linear()"):
        loss = lambda theta, params, batch, key: own(params)  # noqa: E731
        jax.eval_shape(made(loss=loss).estimate, KEY, theta, begun())
    with raises(TypeError, "`inner_optimizer`", "ug.training_problem"):
        build("delta_stn", data, inner_optimizer=lambda theta: optax.sgd(theta))
    with raises(TypeError, "`response`", "stn.linear()"):
        build("delta_stn", data, response=mistyped("rows"))
    with raises(ValueError, "`sigma`", "sigma['decay']=-1"):
        build("delta_stn", data, sigma={"decay": -1.0, "scale": 1.0, "shift": 1.0})
    with raises(ValueError, "`train_steps`"):
        build("delta_stn", data, train_steps=0)
    with raises(ValueError, "`warm_up`", "-1"):
        build("delta_stn", data, warm_up=-1)
    with raises(ValueError, "`entropy`"):
        build("delta_stn", data, entropy=-1.0)
    with raises(ValueError, "`sigma_optimizer`"):
        build("delta_stn", data, tune_sigma=False, sigma_optimizer=optax.sgd(1.0))
    with raises(ValueError, "`meta_loss`", "scalar"):
        begun(meta_loss=lambda theta, params, key: params["half"])
    with raises(TypeError, "`response.apply", "params['b']"):
        begun(response=ug.stn.Response(lambda *args: jnp.zeros(()), lambda weights, d: weights))
    with raises(ValueError, "`axis`=2", "(3, 2)"):
        begun(response=ug.stn.scaled_rows(2))
    with raises(ValueError, "`delta_stn` draws its own batches", "`sample_batch`"):
        made().estimate(KEY, theta, None, data=data)
    with raises(ValueError, "`history` has no theta"):
        ug.stn.schedule({"loss": np.zeros(1)}, jnp.zeros(()))
    with raises(ValueError, "2 numbers", "(1,)"):
        history = {"theta": np.zeros((3, 1)), "sigma": np.zeros((3, 1))}
        ug.stn.schedule({**history, "loss": np.zeros(3), "inner_steps": np.ones(3)}, jnp.zeros(2))
    assert "delta_stn(meta_loss=meta_loss, " in repr(build("delta_stn", data))


def jnp_theta():
    return {
        "decay": jnp.float32(0.0),
        "scale": [jnp.zeros(3, jnp.bfloat16), None],
        "shift": (jnp.float32(0.1),),
    }
