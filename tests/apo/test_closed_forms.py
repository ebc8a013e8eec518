"""The hyperparameters' limits on a quadratic with gradient noise, against closed forms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unrollgrad import apo

D = 5
LAMBDA_FSD, LAMBDA_WSD = 0.5, 0.3


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def positive_definite(seed, low, high):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(D, D)))
    return (q * np.geomspace(low, high, D)) @ q.T


def quadratic():
    """H, G and the covariance of the gradient at zero weights; its mean there is 0."""
    return (
        positive_definite(1, 0.2, 2.0),
        positive_definite(2, 0.1, 1.0),
        positive_definite(3, 1, 4),
    )


def curvature(linearised):
    h, g, _ = quadratic()
    return LAMBDA_FSD * g + LAMBDA_WSD * np.eye(D) + (0 if linearised else h)


def adapted(optimizer, num_steps):
    """The state after steps at fixed weights; each step draws a new gradient."""
    h, g, covariance = quadratic()
    root, root_g = np.linalg.cholesky(covariance), np.linalg.cholesky(g)
    arguments = {
        "loss": lambda w, noise: 0.5 * w @ h @ w + noise @ w,
        "predict": lambda w, _: root_g.T @ w,
        "other_batch": 0.0,
    }
    weights = np.zeros(D)

    def step(state, key):
        noise = root @ jax.random.normal(key, (D,))
        gradient = jax.grad(arguments["loss"])(weights, noise)
        _, state = optimizer.update(gradient, state, weights, batch=noise, **arguments)
        return state, None

    @jax.jit
    def run(key):
        keys = jax.random.split(key, num_steps)
        return jax.lax.scan(step, optimizer.init(weights), keys)[0]

    return run(jax.random.key(0))


def settings(linearised, rate, num_steps, **changes) -> dict[str, Any]:
    return {
        "lambda_fsd": LAMBDA_FSD,
        "lambda_wsd": LAMBDA_WSD,
        "discrepancy": apo.squared_error,
        "linearised": linearised,
        "meta_optimizer": optax.adam(optax.cosine_decay_schedule(rate, num_steps)),
        "meta_interval": 1,
        **changes,
    }


@functools.cache
def learned_preconditioner(linearised):
    optimizer = apo.preconditioner(0.1, structure=apo.dense(), **settings(linearised, 0.02, 10_000))
    factor = np.asarray(adapted(optimizer, 10_000).hyperparams["preconditioner"]["f"])
    return 0.1 * factor @ factor.T


def relative_error(found, truth):
    return np.linalg.norm(found - truth) / np.linalg.norm(truth)


@pytest.mark.parametrize("linearised", [False, True])
def test_dense_preconditioner(linearised):
    """The limit is (H + lambda_fsd G + lambda_wsd I)^-1, without H if the loss is linearised."""
    found = learned_preconditioner(linearised)
    assert relative_error(found, np.linalg.inv(curvature(linearised))) < 1e-3
    assert relative_error(found, np.linalg.inv(curvature(not linearised))) > 0.2  # a control


@pytest.mark.parametrize("linearised", [False, True])
def test_learning_rate(linearised):
    """The limit is E[g'g] / E[g' (H + lambda_fsd G + lambda_wsd I) g]."""
    num_steps = 10_000
    optimizer = apo.learning_rate(optax.sgd, 0.01, **settings(linearised, 0.1, num_steps))
    found = float(optax.tree.get(adapted(optimizer, num_steps), "learning_rate"))
    covariance = quadratic()[2]

    def rate(linearised):
        return np.trace(covariance) / np.trace(covariance @ curvature(linearised))

    assert abs(found / rate(linearised) - 1) < 0.03
    assert abs(found / rate(not linearised) - 1) > 0.2  # a control


def test_each_group_gets_its_own_rate():
    """On a diagonal problem each coordinate's rate becomes 1 / (h + lambda_fsd g + lambda_wsd)."""
    h, g = np.array([0.5, 2.0]), np.array([1.0, 0.1])

    def base(rates):
        return optax.partition(
            {name: optax.sgd(rate) for name, rate in rates.items()}, {"a": "a", "b": "b"}
        )

    optimizer = apo.learning_rate(base, {"a": 0.1, "b": 0.1}, **settings(False, 0.05, 2000))
    weights = {"a": np.zeros(()), "b": np.zeros(())}

    def vector(w):
        return jnp.stack([w["a"], w["b"]])

    def loss(w, noise):
        return 0.5 * jnp.sum(h * vector(w) ** 2) + noise @ vector(w)

    def step(state, key):
        noise = jax.random.normal(key, (2,))
        _, state = optimizer.update(
            jax.grad(loss)(weights, noise),
            state,
            weights,
            loss=loss,
            predict=lambda w, _: jnp.sqrt(g) * vector(w),
            batch=noise,
            other_batch=0.0,
        )
        return state, None

    @jax.jit
    def run(key):
        keys = jax.random.split(key, 2000)
        return jax.lax.scan(step, optimizer.init(weights), keys)[0]

    state = run(jax.random.key(0))
    truth = 1 / (h + LAMBDA_FSD * g + LAMBDA_WSD)
    rates = optax.tree.get(state, "hyperparams")
    np.testing.assert_allclose([rates["a"], rates["b"]], truth, rtol=1e-3)


def test_the_meta_gradient_is_the_derivative_of_the_objective():
    """One meta-step of SGD on the logarithm equals central differences, with Adam as base."""
    h, g, _ = quadratic()
    weights, noise = np.linspace(-1, 1, D), np.arange(1.0, D + 1)

    def loss(w, noise):
        return 0.5 * w @ h @ w + noise @ w + jnp.sum(jnp.sin(w))

    def predict(w, scale):
        return scale * jnp.stack([jnp.cos(w), w @ g])

    rate = 0.3
    meta = settings(False, 1.0, 1, meta_optimizer=optax.sgd(1.0))
    optimizer = apo.learning_rate(lambda r: optax.adam(r, b1=0.5), rate, **meta)

    @jax.jit
    def updated():
        arguments = {"loss": loss, "predict": predict, "batch": noise, "other_batch": 2.0}
        gradient = jax.grad(loss)(weights, noise)
        _, new = optimizer.update(gradient, optimizer.init(weights), weights, **arguments)
        return optax.tree.get(new, "learning_rate")

    moved = np.log(float(updated())) - np.log(rate)

    @jax.jit
    def objective(log_rate):
        gradient = jax.grad(loss)(weights, noise)
        base = optax.adam(jnp.exp(log_rate), b1=0.5)
        step, _ = base.update(gradient, base.init(weights), weights)
        there = weights + step
        away = apo.squared_error(predict(there, 2.0), predict(weights, 2.0)).mean()
        return loss(there, noise) + LAMBDA_FSD * away + LAMBDA_WSD / 2 * jnp.sum(step**2)

    near = np.log(rate)
    slope = float(objective(near + 1e-5) - objective(near - 1e-5)) / 2e-5
    np.testing.assert_allclose(moved, -slope, rtol=1e-6)
