"""Self-tuning networks where the best response is known: quadratics, a linear network, a floor.

The inner loss is z^T H z / 2 + z^T B x - z^T h (``tests/bilevel/closed_forms.py``), so that
z*(x) = H^-1 (h - B x) and its Jacobian is -H^-1 B. Put z = w + R e at x + e with e ~ N(0, S):
the gradient for R has the mean (H R + B) S, whatever sigma is, so that training ends at -H^-1 B;
and at w = z*(x), R = -H^-1 B the gradient vanishes for every e, not only on average. Without noise
in the data both networks therefore converge to the exact Jacobian, at constant rates.

**With noise** g in the gradient of each batch, R <- R - rho ((H R + B) e + g) e^T is linear in R,
and e is independent of g and of R: the mean of R in the limit is the exact Jacobian, too.

**The floor.** Of the loss (z - floor(x))^2 / 2 the linear response is the slope of floor(x + e)
regressed on e. By Stein's lemma it is d E[floor(x + e)] / dx, the sum over the integers k of the
normal density of e at k - x.

**The linear network** y = s^T Q x with the penalty e^theta |dy/dx|^2 on inputs with E[x x^T] =
V diag(d) V^T has, with effective weights u = Q^T s, the loss
E (u^T x - t)^2 + e^theta |u|^2. With c = E[x t] its minimum is

    u*(theta) = V diag(1 / (d + e^theta)) V^T c = V diag(sigmoid(log d - theta)) V^T u*(-inf).

So with hidden units rotated to the eigenvectors, Q = diag(sigmoid(log d - theta)) V^T and s =
V^T u*(-inf): the best response scales the rows of Q, each by a sigmoid, and its derivative is in
``scaled_rows``.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from tests.bilevel import closed_forms as cf
from unrollgrad import implicit

KEY = jax.random.key(0)
PROBLEM = cf.random_quadratic(4, 3)
THETA = np.array([0.4, -0.3, 0.2])


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def as_tree(z):
    return {"bias": z[0], "rest": z[1:]}


def as_array(tree):
    return jnp.concatenate([tree["bias"][None], tree["rest"]])


def split(x):
    return {"a": x[0], "b": (x[1:],)}


def joined(theta):
    return jnp.concatenate([theta["a"][None], theta["b"][0]])


def inner(params, theta, noise=0.0):
    z, x, p = as_array(params), joined(theta), PROBLEM
    return z @ p.hessian @ z / 2 + z @ (p.mixed @ x - p.inner_slope + noise)


def outer(params, theta):
    z, x, p = as_array(params), joined(theta), PROBLEM
    away = p.outer_hessian @ z / 2 + p.outer_mixed @ x - p.outer_slope
    return z @ away + x @ p.theta_hessian @ x / 2 - x @ p.theta_slope


def network(factory, **changes) -> Any:
    settings = {
        "loss": lambda theta, params, batch, key: inner(params, theta, jnp.mean(batch, 0)),
        "meta_loss": lambda theta, params, key: outer(params, theta),
        "init_params": lambda key: as_tree(jnp.zeros(4)),
        "sample_batch": lambda key: jnp.zeros((2, 4)),
        "inner_optimizer": optax.sgd(0.3),
        "response_optimizer": optax.sgd(0.2),
        "response": ug.stn.linear(),
        "tune_sigma": False,
        "train_steps": 5,
        **changes,
    }
    return factory(**settings)


@functools.partial(jax.jit, static_argnums=(0, 3))
def at_fixed_theta(estimator, key, theta, calls):
    """The carried state after so many calls at one theta, and their estimates."""

    def call(state, i):
        out, state = estimator.estimate(key, theta, state)
        return state, out

    state, outs = jax.lax.scan(call, estimator.init(key, theta), jnp.arange(calls))
    return state.carried, outs


def jacobian(response):
    """Of ``linear()``, as a matrix; with a leading axis of seeds if there is one."""
    return np.concatenate([response["bias"][..., None, :], response["rest"]], -2)


EXACT = -np.linalg.solve(PROBLEM.hessian, PROBLEM.mixed)


class Ran(NamedTuple):
    carried: Any
    grad: np.ndarray


@functools.cache
def converged(name) -> Ran:
    estimator = network(getattr(ug.stn, name))
    carried, outs = at_fixed_theta(estimator, KEY, split(jnp.asarray(THETA)), 600)
    return Ran(carried, np.asarray(joined(jax.tree.map(lambda x: x[-1], outs.grad))))


@pytest.mark.parametrize("name", ["delta_stn", "stn"])
def test_the_response_is_the_exact_jacobian(name):
    carried = converged(name).carried
    np.testing.assert_allclose(jacobian(carried.response), EXACT, rtol=0, atol=1e-4)
    z = np.asarray(as_array(carried.params))
    if name == "stn":  # its params are the weights at theta = 0
        z = z + jacobian(carried.response) @ THETA
    np.testing.assert_allclose(z, cf.inner_minimum(PROBLEM, THETA), rtol=0, atol=1e-4)
    wrong = np.linalg.solve(PROBLEM.hessian, PROBLEM.mixed)
    assert np.max(np.abs(jacobian(carried.response) - wrong)) > 0.1


@pytest.mark.parametrize("name", ["delta_stn", "stn"])
def test_the_gradient_is_the_hypergradient(name):
    found, exact = converged(name).grad, cf.hypergradient(PROBLEM, THETA)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-4 * float(np.linalg.norm(exact)))
    solve = implicit.hypergradient(outer, inner, solver=implicit.dense())
    theirs = solve(as_tree(cf.inner_minimum(PROBLEM, THETA)), split(jnp.asarray(THETA))).grad
    assert np.linalg.norm(found - joined(theirs)) < 0.01 * np.linalg.norm(joined(theirs))
    _, direct = cf.slopes(PROBLEM, cf.inner_minimum(PROBLEM, THETA), THETA)
    assert np.linalg.norm(found - direct) > 0.1 * np.linalg.norm(exact)  # the response matters


def test_with_noisy_batches_the_response_is_exact_on_average():
    seeds = jax.vmap(jax.random.key)(jnp.arange(64))
    estimator = network(
        ug.stn.delta_stn,
        sample_batch=lambda key: 0.5 * jax.random.normal(key, (2, 4)),
        inner_optimizer=optax.sgd(0.05),
        response_optimizer=optax.sgd(0.05),
        sigma={"a": 0.5, "b": (np.array([1.0, 1.5]),)},
        num_perturbations=2,
    )

    def run(key):
        return at_fixed_theta(estimator, key, split(jnp.asarray(THETA)), 150)[0].response

    found = jacobian(jax.vmap(run)(seeds))
    error = found.std(0, ddof=1) / np.sqrt(len(found))
    assert np.max(error) < 0.05 * np.linalg.norm(EXACT)  # it would see a wrong response
    assert np.max(np.abs(found.mean(0) - EXACT) / error) < 4
    assert np.max(np.abs(found.mean(0) - 0.8 * EXACT) / error) > 6


def test_a_whole_number_has_the_slope_of_its_steps():
    theta, sigma = 0.5, 0.3
    estimator = ug.stn.delta_stn(
        loss=lambda theta, w, batch, key: (w - jnp.floor(theta)) ** 2 / 2,
        meta_loss=lambda theta, w, key: w,
        init_params=lambda key: jnp.zeros(()),
        sample_batch=lambda key: None,
        inner_optimizer=optax.sgd(0.1),
        sigma=sigma,
        tune_sigma=False,
    )

    def run(key):
        return at_fixed_theta(estimator, key, jnp.asarray(theta), 300)[1].grad[-1]

    found = np.asarray(jax.vmap(run)(jax.vmap(jax.random.key)(jnp.arange(200))))
    away = (np.arange(-9, 11) - theta) / sigma
    slope = np.sum(np.exp(-(away**2) / 2)) / np.sqrt(2 * np.pi) / sigma
    error = found.std(ddof=1) / np.sqrt(len(found))
    assert abs(found.mean() - slope) < 4 * error
    assert abs(slope - 1) > 8 * error  # one is the slope for a large sigma
    assert abs(slope) > 8 * error  # zero is floor's own derivative


def test_sigma_settles_where_the_entropy_says():
    """With w* = theta and the validation loss a w^2 / 2, sigma's objective is

    a (theta^2 + sigma^2) / 2 - entropy log sigma, least at sigma = sqrt(entropy / a).
    """
    curvature, entropy = 2.0, 0.08
    estimator = ug.stn.delta_stn(
        loss=lambda theta, w, batch, key: (w - theta) ** 2 / 2,
        meta_loss=lambda theta, w, key: curvature * w**2 / 2,
        init_params=lambda key: jnp.zeros(()),
        sample_batch=lambda key: None,
        inner_optimizer=optax.sgd(0.3),
        sigma=1.0,
        sigma_optimizer=optax.sgd(0.02),
        entropy=entropy,
        train_steps=2,
    )

    def run(key):
        sigma = at_fixed_theta(estimator, key, jnp.asarray(0.7), 3000)[1].info.sigma
        return jnp.mean(sigma[1000:])

    found = np.asarray(jax.vmap(run)(jax.vmap(jax.random.key)(jnp.arange(50))))
    error = found.std(ddof=1) / np.sqrt(len(found))
    least = np.sqrt(entropy / curvature)
    assert abs(found.mean() - least) < 0.03 * least  # a constant rate leaves a bias of its order
    assert error < 0.01 * least
    assert abs(found.mean() - np.sqrt(2) * least) > 20 * error  # twice the entropy


def test_each_row_has_its_own_perturbation():
    """From zero, one step at rate 1 makes R the mean of e^2 over the perturbations.

    Its mean is sigma^2, and its variance 2 sigma^4 / G for G independent perturbations.
    """
    sigma, rows = 0.7, 16
    found = {}
    for groups in (1, rows):
        estimator = ug.stn.delta_stn(
            loss=lambda theta, w, batch, key: jnp.mean((w - theta) ** 2 * batch) / 2,
            meta_loss=lambda theta, w, key: w,
            init_params=lambda key: jnp.zeros(()),
            sample_batch=lambda key: jnp.ones(rows),
            inner_optimizer=optax.sgd(1.0),
            response=ug.stn.linear(),
            sigma=sigma,
            tune_sigma=False,
            train_steps=1,
            num_perturbations=groups,
        )

        def run(key, estimator=estimator):
            return at_fixed_theta(estimator, key, jnp.zeros(()), 1)[0].response[0]

        found[groups] = np.asarray(jax.vmap(run)(jax.vmap(jax.random.key)(jnp.arange(1000))))
    for groups, x in found.items():
        error = sigma**2 * np.sqrt(2 / groups / len(x))
        assert abs(x.mean() - sigma**2) < 4 * error
        assert np.var(x) == pytest.approx(2 * sigma**4 / groups, rel=0.25)


INPUTS = np.array([2.0, 0.7, 0.2])  # the variances d along the eigenvectors
ROTATION = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))[0]
TARGET = np.array([1.0, -1.0, 0.5])  # u*(-inf): the targets are noiseless
PENALTY = 0.0  # theta


def effective(params):
    return params["units"].T @ params["out"]


def linear_network() -> ug.stn.SplitLoss:
    """Its outputs are the effective weights, which are the Jacobian too."""
    second = ROTATION * INPUTS @ ROTATION.T

    def loss(theta, u, batch, key):
        return (u - TARGET) @ second @ (u - TARGET) + jnp.exp(theta) * u @ u

    return ug.stn.SplitLoss(lambda theta, params, batch, key: effective(params), loss)


def gated(theta):
    """The weights of the best response: rotated hidden units, gated by sigmoids."""
    gates = jax.nn.sigmoid(jnp.log(INPUTS) - theta)
    return {"units": gates[:, None] * ROTATION.T, "out": ROTATION.T @ TARGET}


def test_gating_is_the_best_response_of_a_linear_network():
    loss = linear_network()

    def slopes(theta):
        grad = jax.grad(lambda params: loss(theta, params, None, KEY))(gated(theta))
        other = jax.tree.map(lambda x: 1.1 * x, gated(theta))
        return grad, jax.grad(lambda params: loss(theta, params, None, KEY))(other)

    right, wrong = jax.jit(jax.vmap(slopes))(jnp.linspace(-2, 2, 5))
    assert max(np.max(np.abs(x)) for x in jax.tree.leaves(right)) < 1e-12
    assert min(np.max(np.abs(x)) for x in jax.tree.leaves(wrong)) > 1e-2


def test_scaled_rows_learn_the_gates():
    """The network begins away from the gated one, whose rows' rotation is one of many."""
    law = ug.stn.scaled_rows(axis=0)
    estimator = ug.stn.delta_stn(
        loss=linear_network(),
        meta_loss=lambda theta, params, key: effective(params)[0],
        init_params=lambda key: jax.tree.map(lambda x: 0.8 * x, gated(PENALTY)),
        sample_batch=lambda key: None,
        inner_optimizer=optax.sgd(0.1),
        response_optimizer=optax.adam(optax.exponential_decay(0.03, 3000, 0.1)),
        response=law,
        sigma=0.02,
        tune_sigma=False,
    )
    carried, _ = at_fixed_theta(estimator, KEY, jnp.asarray(PENALTY), 2000)

    def slope(params, move):
        return jax.jvp(effective, (params,), (move,))[1]

    found = slope(carried.params, law.apply(carried.response, jnp.ones(())))
    exact = jax.jvp(lambda theta: effective(gated(theta)), (PENALTY,), (1.0,))[1]
    gates = 1 / (1 + np.exp(PENALTY) / INPUTS)
    by_hand = -ROTATION @ (gates * (1 - gates) * (ROTATION.T @ TARGET))
    np.testing.assert_allclose(exact, by_hand, rtol=0, atol=1e-12)
    np.testing.assert_allclose(effective(carried.params), effective(gated(PENALTY)), atol=1e-6)
    assert np.linalg.norm(found - exact) < 0.005 * np.linalg.norm(exact)
