"""The closed forms of ``tests/bilevel/closed_forms.py`` against simulations in NumPy.

Two programs are compiled, for derivatives of losses. The simulations write every algorithm out as
loops over gradients; the closed forms multiply matrices.
"""

import jax
import numpy as np
import pytest

from tests.bilevel import closed_forms as cf

RATES = cf.Rates(0.2, 0.3, 0.05)


def inner_move(p, rate, z, x):
    return z - rate * (p.hessian @ z + p.mixed @ x - p.inner_slope)


def simulated(name, p, rates, at):
    """One step, written from the papers' pseudo-code."""
    z, q, x = at
    if name == "soba":
        a, b = cf.slopes(p, z, x)
        return cf.Exact(
            inner_move(p, rates.inner, z, x),
            q - rates.linear * (p.hessian @ q - a),
            x - rates.outer * (b - p.mixed.T @ q),
        )
    for _ in range({"fsla": 1, "amigo": 3, "stocbio": 2}[name]):
        z = inner_move(p, rates.inner, z, x)
    a, b = cf.slopes(p, z, x)
    if name == "stocbio":
        factor = np.eye(len(z)) - rates.linear * p.hessian
        q = rates.linear * sum(np.linalg.matrix_power(factor, j) @ a for j in range(5))
    for _ in range({"fsla": 1, "amigo": 4, "stocbio": 0}[name]):
        q = q - rates.linear * (p.hessian @ q - a)
    return cf.Exact(z, q, x - rates.outer * (b - p.mixed.T @ q))


def matrix(name, p, rates):
    given = {"amigo": (3, 4), "stocbio": (2, 5)}
    return getattr(cf, name)(p, rates, *given.get(name, ()))


@pytest.mark.parametrize("name", ["soba", "fsla", "amigo", "stocbio"])
def test_powers_of_the_matrix_are_the_algorithm(name):
    p = cf.random_quadratic()
    at = start = cf.Exact(np.ones(4), -np.ones(4), np.ones(3))
    for _ in range(20):
        at = simulated(name, p, RATES, at)
    found = cf.after(matrix(name, p, RATES), start, 20)
    for ours, theirs in zip(found, at, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    other = cf.after(cf.soba(p, RATES, sign=-1), start, 20)
    assert np.max(np.abs(other.theta - at.theta)) > 1e-2  # the flipped sign goes elsewhere


@pytest.mark.parametrize("name", ["soba", "fsla", "amigo"])
def test_the_fixed_point_is_the_solution(name):
    p = cf.random_quadratic()
    exact = cf.stacked(cf.solution(p))
    np.testing.assert_allclose(cf.hypergradient(p, cf.solution(p).theta), 0, atol=1e-12)
    np.testing.assert_allclose(matrix(name, p, RATES) @ exact, exact, atol=1e-12)
    assert cf.radius(matrix(name, p, RATES)) < 1
    assert np.max(np.abs(cf.stocbio(p, RATES, 2, 5) @ exact - exact)) > 1e-3  # it is biased


def test_the_hypergradient_is_the_derivative_of_the_outer_loss():
    p, theta, step = cf.random_quadratic(), np.array([0.3, -0.2, 0.5]), 1e-4

    def value(theta):
        z = cf.inner_minimum(p, theta)
        quadratic = z @ p.outer_hessian @ z / 2 + z @ p.outer_mixed @ theta
        quadratic += theta @ p.theta_hessian @ theta / 2
        return quadratic - z @ p.outer_slope - theta @ p.theta_slope

    slope = [(value(theta + step * e) - value(theta - step * e)) / 2 / step for e in np.eye(3)]
    np.testing.assert_allclose(cf.hypergradient(p, theta), slope, atol=1e-7)


@pytest.mark.parametrize("row", cf.SPECTRAL_RADII)
def test_spectral_radii(row):
    """The reference's table, its diverging rows, and what the radius means for a run."""
    mu, kappa, rho, gamma = row
    p, rates = cf.scalar(mu, kappa), cf.Rates(rho, rho, gamma)
    found = cf.radius(cf.soba(p, rates))
    assert abs(found - cf.SPECTRAL_RADII[row]) < (1e-5 if found < 1 else 5e-5)
    exact = cf.solution(p)
    start = cf.Exact(np.ones(1), np.zeros(1), np.ones(1))
    away = [abs(cf.after(cf.soba(p, rates), start, k).theta - exact.theta)[0] for k in (1000, 5000)]
    assert away[1] > 10 * away[0] if found > 1 else away[1] < max(0.1 * away[0], 1e-12)
    assert cf.radius(cf.soba(p, rates, sign=-1)) > 1


def test_additive_noise_and_the_lyapunov_equation():
    """4,000 chains in NumPy; with another noise the same chains are rejected."""
    p, rates, chains = cf.scalar(), cf.Rates(0.1, 0.1, 0.01), 4000
    m, noise = cf.soba(p, rates), cf.additive(p, rates, 0.1)
    exact = cf.stationary_covariance(m, noise)
    np.testing.assert_allclose(np.diag(exact), (6.497e-4, 8.757e-4, 1.533e-4), rtol=1e-3)
    draw, state = np.random.default_rng(0).standard_normal, np.zeros((chains, 3))
    for _ in range(1000):
        state = state @ m[:-1, :-1].T + draw((chains, 3)) * np.sqrt(np.diag(noise))
    away = np.diag(np.cov(state.T)) / np.diag(exact) - 1
    assert np.max(np.abs(away)) < 4 * np.sqrt(2 / chains)
    wrong = np.diag(cf.stationary_covariance(m, 1.44 * noise))
    assert np.max(np.abs(np.diag(np.cov(state.T)) / wrong - 1)) > 4 * np.sqrt(2 / chains)


def test_random_matrices_and_their_moments():
    """SOBA on finite sums with fresh samples: the exact mean and covariance it wanders with."""
    sums, rates, chains = cf.finite_sum(4, 1, random_curvature=True), cf.Rates(0.1, 0.1, 0.05), 4000
    inner, outer = range(4), range(4)
    choices = [
        cf.Quadratic(*(field[i] for field in sums.data[:3]), *(field[j] for field in sums.data[3:]))
        for i in inner
        for j in outer
    ]
    matrices = np.stack([cf.soba(p, rates) for p in choices])
    middle, covariance = cf.stationary_moments(list(matrices))
    rng, state = np.random.default_rng(0), np.tile(cf.stacked(sums.exact), (chains, 1))
    for _ in range(1000):
        state = np.einsum("cij,cj->ci", matrices[rng.integers(16, size=chains)], state)
    found = state[:, :-1]
    errors = np.sqrt(np.diag(covariance) / chains)
    assert np.max(np.abs(found.mean(0) - middle) / errors) < 4
    np.testing.assert_allclose(np.var(found, 0), np.diag(covariance), rtol=5 * np.sqrt(2 / chains))
    assert np.max(np.abs(found[0] - cf.stacked(sums.exact)[:-1])) > 1e-3  # it has a noise floor


def test_biases():
    mu, eta, lam, x = 0.7, 0.3, 5.0, np.array([0.4])
    p = cf.scalar(mu, 0.1)
    z = cf.inner_minimum(p, x)
    true = -p.mixed.T @ np.linalg.solve(p.hessian, cf.slopes(p, z, x)[0])
    q = np.zeros(1)
    for _ in range(6):
        q = q - eta * (p.hessian @ q - cf.slopes(p, z, x)[0])
    np.testing.assert_allclose(-p.mixed.T @ q / true - 1, cf.neumann_bias(mu, eta, 6), atol=1e-12)
    implicit = cf.penalty_hypergradient(p, x, lam) - cf.slopes(p, z, x)[1]
    np.testing.assert_allclose(implicit / true - 1, cf.penalty_bias(mu, lam), atol=1e-12)
    away = 0.0
    for _ in range(200):
        away = (1 - eta * mu) ** 3 * (away + 0.01)
    assert abs(away - cf.lag(mu, eta, 3, 0.01)) < 1e-12
    terms = [8 * eta * np.prod([1 - eta * mu] * k) for k in range(8)]
    np.testing.assert_allclose(cf.randomised_neumann(mu, eta, 8), (np.mean(terms), np.var(terms)))


def test_penalty_with_both_minimisers_by_descent():
    """F2SA's direction where descent has found both inner minima, for matrices."""
    p, theta, lam = cf.random_quadratic(), np.array([0.3, -0.2, 0.5]), 3.0
    low = high = np.zeros(4)
    for _ in range(2000):
        low = inner_move(p, 0.2, low, theta)
        slope = p.hessian @ high + p.mixed @ theta - p.inner_slope
        high = high - 0.1 * (cf.slopes(p, high, theta)[0] + lam * slope)
    direction = cf.slopes(p, high, theta)[1] + lam * p.mixed.T @ (high - low)
    np.testing.assert_allclose(cf.penalty_hypergradient(p, theta, lam), direction, atol=1e-12)
    gap = [
        np.linalg.norm(cf.penalty_hypergradient(p, theta, lam) - cf.hypergradient(p, theta))
        for lam in (1e3, 1e4)
    ]
    assert 9 < gap[0] / gap[1] < 11  # the bias is of order 1 / lambda


@pytest.mark.parametrize("make", [cf.finite_sum, cf.finite_sum_of_trees])
def test_losses_of_the_finite_sum_are_its_quadratics(make):
    """Derivatives by JAX are those of the matrices, batch by batch."""
    sums = make(4, random_curvature=True)
    trees = make is cf.finite_sum_of_trees
    data = cf.Quadratic(**sums.data) if trees else sums.data
    z, x = np.array([0.2, -0.4, 0.6]), np.array([0.5, 0.1, -0.3])
    tree = cf.as_tree if trees else np.asarray
    rows = jax.tree.map(lambda field: field[1:3], sums.data)
    with jax.enable_x64(True):
        found = jax.jit(
            lambda *at: [jax.grad(loss, (0, 1))(*at) for loss in (sums.inner, sums.outer)]
        )(tree(z), tree(x), rows)
    p = cf.mean(cf.Quadratic(*(field[1:3] for field in data)))
    moved = p.hessian @ z + p.mixed @ x - p.inner_slope
    expected = ((moved, p.mixed.T @ z), cf.slopes(p, z, x))
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(one)])
            np.testing.assert_allclose(flat, other, atol=1e-12)


def test_blocks():
    """The identities of many blocks: all sampled, delayed, permuted, and one block alone."""
    mus, rates, num = np.array([0.5, 1.0, 1.5, 2.0]), cf.Rates(0.1, 0.1, 0.02), 4
    state, everyone = cf.blocks_start(num), np.arange(num)
    for _ in range(30):
        state = cf.blocks_step(mus, rates, state, everyone)
    start = cf.Exact(np.zeros(num), np.zeros(num), np.zeros(1))
    found = cf.after(cf.blocks_soba(mus, rates), start, 30)
    np.testing.assert_allclose(found.params, state.params, atol=1e-13)
    np.testing.assert_allclose(found.v, state.v, atol=1e-13)
    np.testing.assert_allclose(found.theta, state.theta, atol=1e-13)

    one = cf.blocks_soba(mus[:1], rates)
    np.testing.assert_array_equal(one, cf.soba(cf.scalar(0.5), rates))

    order = np.array([2, 0, 3, 1])
    other = cf.blocks_start(num)
    for _ in range(30):
        other = cf.blocks_step(mus[order], rates, other, everyone)
    np.testing.assert_allclose(other.params, state.params[order], atol=1e-13)
    assert abs(other.theta - state.theta) < 1e-13

    distances = []
    for scale in (1e-2, 1e-3):  # a sweep of single blocks, with delays, and four full steps
        small = cf.Rates(*(scale * rate for rate in (1.0, 1.0, 0.2)))
        begun = cf.Blocks(np.full(num, 2.0), np.ones(num), num - 1.0 - everyone, 0.5)
        full, delayed = begun._replace(misses=np.zeros(num)), begun
        for i in range(num):
            full = cf.blocks_step(mus, small, full, everyone)
            delayed = cf.blocks_step(mus, small, delayed, np.array([i]))
        moved = np.abs(full.params - begun.params)
        distances.append(np.max(np.abs(full.params - delayed.params) / moved))
    assert distances[0] < 0.2
    assert 8 < distances[0] / distances[1] < 12  # equal to first order in the rates
