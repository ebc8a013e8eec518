"""Groups of a batch that share the weights: the same numbers as with weights of their own.

The network has every operation that the rules know (a lookup, a convolution, a recurrent cell in a
scan, a scan over stacked layers, products from both sides, a transpose) and one that they do not
(the sum of squares).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from unrollgrad.stn import _steps
from unrollgrad.stn.losses import moved_loss, shared_loss

pytest.importorskip("quax")
KEY = jax.random.key(0)
GROUPS = 3
SHAPES = {
    "embed": (7, 4),
    "kernel": (3, 4, 5),
    "memory": (5, 5),
    "layers": (2, 5, 5),
    "out": (5, 2),
    "left": (2, 6),
    "bias": (6,),
}
RNG = np.random.default_rng(0)
PARAMS = {name: RNG.normal(0, 0.5, shape).astype(np.float32) for name, shape in SHAPES.items()}
ROWS = RNG.integers(0, 8, (GROUPS, 4, 6), np.int32)  # there is no row 7
THETAS = RNG.normal(size=(GROUPS, 2)).astype(np.float32)
LAW = ug.stn.scaled_rows(initial_std=1.0)


def predict(theta, params, rows, key):
    rows = params["embed"].at[rows].get(mode="fill", fill_value=0.5)
    x = rows * jnp.exp(theta[0] / 4)
    x = jax.lax.conv_general_dilated(
        x, params["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )

    def step(hidden, x):
        return jnp.tanh(x + hidden @ params["memory"]), None

    hidden, _ = jax.lax.scan(step, jnp.zeros((x.shape[0], 5)), jnp.swapaxes(x, 0, 1))
    layers = jnp.swapaxes(params["layers"], 1, 2)
    hidden, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), hidden, layers)
    hidden = (params["out"].T @ hidden.T).T
    return hidden @ params["left"].astype(jnp.float32) + params["bias"], params


def of_outputs(theta, outputs, rows, key):
    y, params = outputs
    size = sum(jnp.sum(x**2) for x in jax.tree.leaves(params))
    return jnp.mean((y - theta[1]) ** 4) + 0.1 * size


SPLIT = ug.stn.SplitLoss(predict, of_outputs)


def both(loss):
    """Loss and gradients for params and response: groups with weights of their own, and shared."""

    def dense(params, response):
        def group(theta, rows):
            return moved_loss(loss, theta, (params, LAW.apply(response, theta)), rows, KEY)

        return jnp.mean(jax.vmap(group)(THETAS, ROWS))

    def shared(params, response):
        def group(theta, rows):
            def moved(share, linear):
                assert LAW.shared is not None
                return LAW.shared(response, params, share * theta, linear)

            return shared_loss(loss, theta, moved, rows, KEY)

        return jnp.mean(jax.vmap(group)(THETAS, ROWS))

    @jax.jit
    def run(params):
        response = LAW.init(KEY, params, THETAS[0])
        return [jax.value_and_grad(f, (0, 1))(params, response) for f in (dense, shared)]

    return run(PARAMS)


@functools.cache
def whole():
    return both(lambda *args: SPLIT(*args))


def test_the_same_loss_and_gradients():
    first, second = whole()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), first, second)
    assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(first))


def test_the_same_linear_outputs():
    """Their gradient for the response; the weights are constants there."""
    first, second = ((value, grads[1]) for value, grads in both(SPLIT))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), first, second)
    assert abs(float(whole()[0][0] - first[0])) > 1e-2  # linear outputs are others


@pytest.mark.parametrize(("name", "split"), [("delta_stn", True), ("stn", False)])
def test_no_group_has_weights_of_its_own(name, split):
    """Memory of temporaries, counted by XLA, with one perturbation for each of 64 rows."""
    width, rows = 256, 64

    def outputs(theta, params, batch, key):
        for layer in params:
            batch = jnp.tanh(batch @ layer["w"] + layer["b"])
        return batch

    loss = ug.stn.SplitLoss(outputs, lambda theta, y, batch, key: jnp.mean((y - theta) ** 2))
    params = [{"w": np.eye(width, dtype=np.float32), "b": np.zeros(width, np.float32)}] * 2
    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    law = ug.stn.scaled_rows()
    used = []
    for response in (law, law._replace(shared=None)):
        estimator = getattr(ug.stn, name)(
            loss=loss if split else lambda *args: loss(*args),
            meta_loss=lambda theta, params, key: params[0]["b"][0],
            init_params=lambda key: jax.tree.map(jnp.asarray, params),
            sample_batch=lambda key: jnp.ones((rows, width)),
            inner_optimizer=optax.sgd(0.1),
            response=response,
            num_perturbations=rows,
        )
        state = jax.eval_shape(estimator.init, KEY, np.float32(0))
        compiled = jax.jit(estimator.estimate).lower(KEY, np.float32(0), state).compile()
        memory: Any = compiled.memory_analysis()
        used.append(memory.temp_size_in_bytes / weights)
    print(
        f"{name}, split {split}: temporaries of {used[0]:.1f} and {used[1]:.1f} times the weights"
    )
    assert used[0] < 10 < used[1]


def test_without_quax_the_weights_are_added_up(monkeypatch):
    settings: Any = type("", (), {"num_perturbations": 2, "response": LAW})
    assert _steps.shares_weights(settings)
    monkeypatch.setattr(_steps.importlib.util, "find_spec", lambda name: None)
    assert not _steps.shares_weights(settings)
    monkeypatch.undo()
    settings.response = ug.stn.linear()
    assert not _steps.shares_weights(settings)
    settings.response, settings.num_perturbations = LAW, 1
    assert not _steps.shares_weights(settings)
