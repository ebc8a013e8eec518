"""The stochastic bilevel algorithms against closed forms on quadratics."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.bilevel import closed_forms as exact
from tests.bilevel.closed_forms import Exact, Rates
from tests.helpers import raises
from unrollgrad import bilevel
from unrollgrad.bilevel import REGISTRY

KEY = jax.random.key(0)
RATES = Rates(0.1, 0.1, 0.05)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def settings(rates: Rates = RATES, **changes: Any) -> dict[str, Any]:
    """Arguments for all factories."""
    return {
        "inner_optimizer": optax.sgd(rates.inner),
        "linear_optimizer": optax.sgd(rates.linear),
        "linear_rate": rates.linear,
        "inner_steps": 3,
        "linear_steps": 2,
        "terms": 4,
        **changes,
    }


@functools.partial(jax.jit, static_argnums=(0, 2, 4))
def run(estimator, theta, rate, key, num_steps):
    """Theta and the carried state after the steps of ``optax.sgd(rate)``, and all estimates."""

    def step(carry, _):
        theta, state = carry
        out, state = estimator.estimate(key, theta, state)
        return (theta - rate * out.grad, state), (out.grad, out.info)

    (theta, state), seen = jax.lax.scan(step, (theta, estimator.init(key, theta)), length=num_steps)
    return theta, state.carried, seen


def full(name, rates=RATES, sums=None, **changes):
    """An algorithm on all data at once, from a point that is not the solution."""
    sums = exact.finite_sum() if sums is None else sums
    data = bilevel.finite_sum(sums.data, len(sums.data.inner_slope))
    estimator = REGISTRY[name].build(
        sums.outer,
        sums.inner,
        init_params=lambda key: jnp.ones(3),
        outer_data=data,
        inner_data=data,
        **settings(rates, **changes),
    )
    start = Exact(np.ones(3), np.zeros(3), np.full(3, 2.0))
    return estimator, start, sums


MATRICES = {
    "soba": lambda p, rates: exact.soba(p, rates),
    "fsla": lambda p, rates: exact.fsla(p, rates),
    "amigo": lambda p, rates: exact.amigo(p, rates, 3, 2),
    "stocbio": lambda p, rates: exact.stocbio(p, rates, 3, 5),
    "mrbo": lambda p, rates: mrbo(p, rates),
}


def mrbo(p, rates):
    """params and theta move from the same point; theta along a series of 5 terms."""
    matrix = exact.stocbio(p, rates, 0, 5)
    d = len(p.inner_slope)
    matrix[:d] = exact.soba(p, rates)[:d]
    return matrix


@pytest.mark.parametrize("name", MATRICES)
def test_without_noise_the_steps_are_powers_of_a_matrix(name):
    estimator, start, sums = full(name)
    theta, at, _ = run(estimator, start.theta, RATES.outer, KEY, 30)
    expected = exact.after(MATRICES[name](sums.full, RATES), start, 30)
    for found, value in zip((at.params, at.v, theta), expected, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-9)
    other = {"soba": "fsla", "fsla": "soba", "amigo": "stocbio"}.get(name, "amigo")
    wrong = exact.after(MATRICES[other](sums.full, RATES), start, 30)
    assert np.max(np.abs(np.asarray(theta) - wrong.theta)) > 1e-3


def scalar(mu, kappa, noise=0.0):
    """The scalar example with additive noise of this standard deviation on all directions."""

    def inner(z, x, batch):
        return mu * z**2 / 2 - z * x + noise * batch[0] * z

    def outer(z, x, batch):
        return (z - 1) ** 2 / 2 + kappa * x**2 / 2 + noise * (batch[1] * z + batch[2] * x)

    return outer, inner


def test_the_table_of_spectral_radii():
    """One program runs all rows; the last two diverge, and the flipped sign of v does."""
    rows = np.array(list(exact.SPECTRAL_RADII))

    @jax.jit
    @jax.vmap
    def states(row):
        mu, kappa, rho, gamma = row
        estimator = bilevel.soba(
            *scalar(mu, kappa),
            init_params=lambda key: jnp.asarray(2.0),
            outer_data=lambda key: jnp.zeros(3),
            inner_data=lambda key: jnp.zeros(3),
            inner_optimizer=optax.sgd(rho),
        )

        def step(carry, _):
            theta, state = carry
            out, state = estimator.estimate(KEY, theta, state)
            theta = theta - gamma * out.grad
            return (theta, state), jnp.stack([state.carried.params, state.carried.v, theta])

        theta = jnp.asarray(3.0)
        return jax.lax.scan(step, (theta, estimator.init(KEY, theta)), length=2000)[1]

    for row, path, expected in zip(
        exact.SPECTRAL_RADII, np.asarray(states(rows)), exact.SPECTRAL_RADII.values(), strict=True
    ):
        mu, kappa, rho, gamma = row
        problem, rates = exact.scalar(mu, kappa), Rates(rho, rho, gamma)
        matrix = exact.soba(problem, rates)
        start = Exact(np.array([2.0]), np.zeros(1), np.array([3.0]))
        np.testing.assert_allclose(
            path[99], np.concatenate(exact.after(matrix, start, 100)), rtol=1e-9
        )
        solved = np.concatenate(exact.solution(problem))
        away = np.linalg.norm(path - solved, axis=1)
        assert (away[-1] > away[999]) == (expected > 1), row
        flipped = exact.after(exact.soba(problem, rates, sign=-1.0), start, 100)
        assert np.max(np.abs(path[99] - np.concatenate(flipped))) > 1e-3


def test_the_stationary_covariance_solves_the_lyapunov_equation():
    mu, kappa, rho, gamma = 1.0, 0.1, 0.1, 0.01
    chains, sd = 4000, 0.1

    def sample(key):
        return jax.random.normal(key, (3,))

    estimator = bilevel.soba(
        *scalar(mu, kappa, sd),
        init_params=lambda key: jnp.asarray(1 / (1 + kappa)),
        outer_data=sample,
        inner_data=sample,
        inner_optimizer=optax.sgd(rho),
    )
    theta = jnp.full(chains, 1 / (1 + kappa))
    ends = jax.vmap(lambda theta, key: run(estimator, theta, gamma, key, 600))(
        theta, jax.random.split(KEY, chains)
    )
    found = np.cov(np.stack([ends[1].params, ends[1].v, ends[0]]))
    problem, rates = exact.scalar(mu, kappa), Rates(rho, rho, gamma)
    noise = exact.additive(problem, rates, sd)
    expected = exact.stationary_covariance(exact.soba(problem, rates), noise)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    # The standard error of a covariance is at most scale * sqrt(2 / chains).
    assert np.max(np.abs(found - expected) / scale) < 4 * np.sqrt(2 / chains)
    flat = exact.stationary_covariance(exact.fsla(problem, rates), noise)
    assert np.max(np.abs(found - flat) / scale) > 4 * np.sqrt(2 / chains)


LAWS = {
    "sgd": bilevel.sgd,
    "saga": bilevel.saga,
    "saga, full start": lambda: bilevel.saga(full_start=True),
    "sarah": lambda: bilevel.sarah(16),
    "page": lambda: bilevel.page(1 / 16),
    "storm": lambda: bilevel.storm(0.0, batches=None),
}


@pytest.mark.parametrize("name", LAWS)
def test_variance_reduction_has_no_noise_floor(name):
    """On finite sums with batches of 3, 3, 3, 3, 3 and 1 rows; SOBA stays at its floor.

    The recursion without a refresh needs differences without noise, so batches of the same size.
    """
    sums = exact.finite_sum()
    data = bilevel.finite_sum(sums.data, 4 if name == "storm" else 3)
    estimator = bilevel.soba(
        sums.outer,
        sums.inner,
        init_params=lambda key: jnp.ones(3),
        outer_data=data,
        inner_data=data,
        inner_optimizer=optax.sgd(0.1),
        directions=LAWS[name](),
    )
    theta, at, _ = run(estimator, jnp.full(3, 2.0), 0.05, KEY, 6000)
    found = max(
        float(np.max(np.abs(np.asarray(x) - y)))
        for x, y in zip((at.params, at.v, theta), sums.exact, strict=True)
    )
    if name == "sgd":
        assert found > 1e-3
    else:
        assert found < 1e-10


def test_the_memory_of_saga_is_the_full_gradient():
    """After an epoch at frozen variables, with a short last batch; and with a full start."""
    sums = exact.finite_sum(10, random_curvature=True)
    data = bilevel.finite_sum(sums.data, 4)
    theta, params, v = jnp.full(3, 2.0), jnp.ones(3), jnp.array([0.3, -1.0, 2.0])

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def memory(num_steps, full_start=False):
        estimator = bilevel.saba(
            sums.outer,
            sums.inner,
            init_params=lambda key: params,
            outer_data=data,
            inner_data=data,
            inner_optimizer=optax.sgd(0.0),
            full_start=full_start,
        )
        state = estimator.init(KEY, theta)
        state = state._replace(carried=state.carried._replace(v=v))
        for _ in range(num_steps):
            _, state = estimator.estimate(KEY, theta, state)
        return state.carried.memory

    p = sums.full
    gradient = p.hessian @ params + p.mixed @ theta - p.inner_slope
    inner = gradient, p.hessian @ v, p.mixed.T @ v
    outer = exact.slopes(p, np.asarray(params), np.asarray(theta))
    epoch, early, begun = memory(3), memory(2), memory(0, True)
    np.testing.assert_allclose(epoch.inner.mean, inner, rtol=1e-12)
    np.testing.assert_allclose(epoch.outer.mean, outer, rtol=1e-12)
    np.testing.assert_allclose(np.mean(epoch.inner.filled().product, 0), inner[1], rtol=1e-12)
    np.testing.assert_allclose(begun.outer.mean, outer, rtol=1e-12)
    np.testing.assert_allclose(begun.inner.mean.gradient, gradient, rtol=1e-12)
    assert np.max(np.abs(early.inner.mean.gradient - gradient)) > 1e-3


def cleaning(touched, batch_size=3, theta=None, max_bytes=2**30):
    """A weight per example of the inner data: rows 0..7, in batches of 3, 3 and 2."""
    draw = np.random.default_rng(0).standard_normal
    x, y = draw((8, 2)), draw(8)

    def inner(w, theta, batch):
        x, y, i = batch
        weight = jax.nn.sigmoid(theta["weights"][i] + theta["all"])
        return jnp.mean(weight * (x @ w - y) ** 2) + 0.1 * jnp.sum(w**2)

    def outer(w, theta, batch):
        x, y, _ = batch
        return jnp.mean((x @ w - y) ** 2) / 2

    data = bilevel.finite_sum((jnp.asarray(x), jnp.asarray(y), jnp.arange(8)), batch_size)
    return bilevel.saba(
        outer,
        inner,
        init_params=lambda key: jnp.ones(2),
        outer_data=data,
        inner_data=data,
        inner_optimizer=optax.sgd(0.1),
        touched=touched,
        max_bytes=max_bytes,
    )


def test_only_touched_entries_are_stored():
    """The same steps as with all entries, from a table of 3 rows of 3 in place of 3 rows of 8."""
    theta = {"weights": jnp.zeros(8), "all": jnp.zeros(1)}

    def touched(batch):
        return {"weights": batch[2], "all": jnp.zeros(1, int)}

    found = []
    for named in (touched, None):
        estimator, at = cleaning(named), theta
        step, state = jax.jit(estimator.estimate), jax.jit(estimator.init)(KEY, at)
        for _ in range(9):
            out, state = step(KEY, at, state)
            at = jax.tree.map(lambda x, g: x - 0.1 * g, at, out.grad)
        found.append((at, state.carried.memory.inner))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), found[0][0], found[1][0]
    )
    assert found[0][1].table.mixed["weights"].shape == (3, 3)
    assert found[1][1].table.mixed["weights"].shape == (3, 8)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12),
        found[0][1].mean,
        found[1][1].mean,
    )
    with raises(ValueError, "saga needs", "MiB", "3 batches of", "`max_bytes`"):
        cleaning(None, max_bytes=100).init(KEY, theta)


@pytest.mark.parametrize("name", ["stocbio", "bsa", "f2sa"])
def test_exact_biases(name):
    """One call at the inner minimum: the implicit term is wrong by the closed form's factor."""
    mu, rho, theta = 0.7, 0.5, jnp.asarray(3.0)
    outer, inner = scalar(mu, 0.0)
    data, calls = (lambda key: jnp.zeros(3)), 4000 if name == "bsa" else 1
    estimator = REGISTRY[name].build(
        outer,
        inner,
        init_params=lambda key: theta / mu,
        outer_data=data,
        inner_data=data,
        **settings(Rates(rho, rho, 0.0), inner_steps=200 if name == "f2sa" else 1),
        penalty=2.0,
        growth=0.0,
    )
    keys = jax.random.split(KEY, calls)
    out = jax.jit(
        jax.vmap(lambda key: estimator.estimate(key, theta, estimator.init(key, theta))[0])
    )(keys)
    implicit = (theta / mu - 1) / mu
    found = np.asarray(out.grad) / implicit
    if name == "stocbio":
        np.testing.assert_allclose(found, 1 + exact.neumann_bias(mu, rho, 5), rtol=1e-9)
        assert abs(found[0] - 1 - exact.neumann_bias(mu, rho, 4)) > 1e-3
        assert int(out.info.gradients[0]) == 1 + 2 * 4 + 3
    elif name == "f2sa":
        np.testing.assert_allclose(found, 1 + exact.penalty_bias(mu, 2.0), rtol=1e-6)
    else:
        mean, variance = exact.randomised_neumann(mu, rho, 4)
        found = found / mu
        assert abs(found.mean() - mean) < 4 * np.sqrt(variance / calls)
        assert abs(found.var() / variance - 1) < 0.1
        # N + K + 2 on average: k is uniform in 0..K-1.
        np.testing.assert_allclose(np.mean(out.info.gradients), 1 + 4 + 2, rtol=0.05)


def test_the_penalties_on_any_quadratic():
    """The direction where the inner problems are solved, for F2SA and the value penalty."""
    sums = exact.finite_sum()
    for name in ("f2sa", "penalty"):
        estimator, start, _ = full(
            name, Rates(0.3, 0.3, 0.0), inner_steps=20, penalty=3.0, growth=0.0
        )
        _, at, (grads, _) = run(estimator, start.theta, 0.0, KEY, 300)
        expected = exact.penalty_hypergradient(sums.full, start.theta, 3.0)
        np.testing.assert_allclose(grads[-1], expected, rtol=1e-6)
        assert np.max(np.abs(grads[-1] - exact.hypergradient(sums.full, start.theta))) > 1e-3
        assert at.v.shape == (3,)


@pytest.mark.parametrize("name", ["amigo", "stocbio"])
def test_warm_inner_loops_lag_behind_a_moving_minimum(name):
    mu, rho, delta = 0.7, 0.5, 0.3
    outer, inner = scalar(mu, 0.0)
    data = lambda key: jnp.zeros(3)  # noqa: E731
    estimator = REGISTRY[name].build(
        outer,
        inner,
        init_params=lambda key: jnp.asarray(0.0),
        outer_data=data,
        inner_data=data,
        **settings(Rates(rho, rho, 0.0)),
    )

    @jax.jit
    def away(key):
        def step(carry, _):
            theta, state = carry
            theta = theta + mu * delta
            _, state = estimator.estimate(key, theta, state)
            return (theta, state), theta / mu - state.carried.params

        begin = jnp.asarray(0.0)
        return jax.lax.scan(step, (begin, estimator.init(key, begin)), length=100)[1]

    np.testing.assert_allclose(away(KEY)[-1], exact.lag(mu, rho, 3, delta), rtol=1e-6)


@pytest.mark.parametrize("kind", ["norm", "value", "gradient"])
def test_one_call_of_bome_and_of_the_gradient_penalty(kind):
    """params and theta's direction after one call, by the formulas of the papers."""
    name = "penalty" if kind == "gradient" else "bome"
    estimator, start, sums = full(name, eta=9.0, penalty=3.0, kind=kind, control=kind)
    _, at, (grads, info) = run(estimator, start.theta, 0.0, KEY, 1)
    p, z, x = sums.full, start.params, start.theta
    a, b = exact.slopes(p, z, x)

    def slope(z):
        return p.hessian @ z + p.mixed @ x - p.inner_slope

    if kind == "gradient":
        along_z, grad = a + 6 * p.hessian @ slope(z), b + 6 * p.mixed.T @ slope(z)
        along_z, cost = along_z / 4, 5
    else:
        low = z
        for _ in range(3):
            low = low - 0.1 * slope(low)

        def value(z):
            return z @ p.hessian @ z / 2 + z @ (p.mixed @ x - p.inner_slope)

        dq_z, dq_x = slope(z), p.mixed.T @ (z - low)
        squares = dq_z @ dq_z + dq_x @ dq_x
        phi = 9.0 * (squares if kind == "norm" else value(z) - value(low))
        weight = max(phi - a @ dq_z - b @ dq_x, 0) / squares
        assert weight > 0
        along_z, grad, cost = a + weight * dq_z, b + weight * dq_x, 3 + 3
    np.testing.assert_allclose(grads[0], grad, rtol=1e-9)
    np.testing.assert_allclose(at.params, z - 0.1 * along_z, rtol=1e-9)
    assert int(info.gradients[0]) == cost
