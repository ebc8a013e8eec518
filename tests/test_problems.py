"""The canonical problems satisfy their docstrings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from unrollgrad.problems import theory

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=0)
def losses(problem, thetas):
    """The loss of one episode at each theta."""
    return jax.vmap(lambda theta: ug.episode_loss(problem, KEY, theta))(thetas)


def loss(problem, theta):
    return losses(problem, np.asarray(theta, np.float32)[None])[0]


def test_influence_balancing():
    problem, theta = ug.problems.influence_balancing(horizon=500)
    final = ug.final_loss(problem, lambda key, theta, s: 0.5 * (s[0] - 1) ** 2)
    at_theta, at_optimum = losses(final, np.array([theta, -1 / 6], np.float32))
    np.testing.assert_allclose(at_theta, 8.0, rtol=1e-4)
    assert at_optimum < 1e-8
    sensitivity = {1: 1, 5: 5, 10: 10, 20: 16.5, 30: 9.9, 40: 0.57, 60: -5.9, 100: -6.0}

    @jax.jit
    @jax.jacfwd
    def reached(theta):
        """s[0] after each of a hundred steps from zero."""

        def step(state, t):
            state, _ = problem.step(KEY, theta, state, t)
            return state, state[0]

        return jax.lax.scan(step, jnp.zeros(23), jnp.arange(100))[1]

    slopes = np.asarray(reached(theta))[[steps - 1 for steps in sensitivity]]
    np.testing.assert_allclose(slopes, list(sensitivity.values()), rtol=0.02)


def test_toy_regression():
    problem, theta = ug.problems.toy_regression()
    axis = np.linspace(-5, 5, 201, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    found = 100 * np.asarray(losses(problem, np.concatenate([np.asarray(theta)[None], grid])))
    np.testing.assert_allclose(found[0], 2488, atol=1)
    assert 545 < np.nanmin(found) < 575


@pytest.mark.parametrize("gradients", ["identical", "independent"])
@pytest.mark.parametrize("init_influence", [0.0, 2.0])
def test_linear_recurrence_influence(gradients, init_influence):
    """It equals jax.grad with a separate theta for every step."""
    problem, theta, influence = ug.problems.linear_recurrence(
        3, 5, gradients=gradients, memory=0.6, curvature=0.3, init_influence=init_influence
    )

    def by_step(thetas):
        state, out = problem.init(KEY, thetas[0]), []
        for t in range(5):
            state, value = problem.step(KEY, thetas[t], state, t)
            out.append(value)
        return jnp.stack(out)

    @jax.jit
    def derivatives(theta):
        total = jax.grad(lambda x: ug.episode_loss(problem, KEY, x))(theta)
        return jax.jacobian(by_step)(jnp.broadcast_to(theta, (5, 3))), total

    by_grad, gradient = derivatives(theta)
    np.testing.assert_allclose(influence(theta), by_grad, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(theory.gradient(influence(theta)), gradient, rtol=1e-4)


def test_linear_recurrence_refuses_other_gradients():
    with pytest.raises(ValueError, match="'other'"):
        ug.problems.linear_recurrence(gradients="other")


def test_chaotic_map_has_its_lyapunov_exponents():
    problem, _ = ug.problems.chaotic_map(horizon=20_000)

    @jax.jit
    @jax.vmap
    def exponents(theta):
        def step(x, t):
            after, _ = problem.step(KEY, theta, x, t)
            return after, jnp.log(jnp.abs(theta * (1 - 2 * x)))

        return jax.lax.scan(step, jnp.float32(0.3), jnp.arange(20_000))[1].mean()

    expected = [-0.916, 0.495, 0.693]
    np.testing.assert_allclose(
        exponents(np.array([3.2, 3.9, 4.0], np.float32)), expected, atol=0.03
    )


def test_chaotic_map_explodes_backwards_and_leaves_beyond_four():
    problem, theta = ug.problems.chaotic_map()
    gradient = jax.jit(jax.grad(lambda x: ug.episode_loss(problem, KEY, x)))(theta)
    assert abs(gradient) > 1e10
    assert not np.isfinite(loss(problem, 4.1))


def test_lorenz():
    solution = np.log([10.0, 28.0])
    for horizon, expected in [(100, 750.07), (500, 322.06)]:
        problem, theta = ug.problems.lorenz(horizon)
        found, at_solution = losses(problem, np.array([theta, solution], np.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-3)
        assert at_solution < 1e-6
    with jax.enable_x64(True):
        problem, theta = ug.problems.lorenz()
        found = losses(problem, np.array([[3.116, 3.7]]))
        np.testing.assert_allclose(found, 353.3, rtol=1e-3)


def test_control():
    problem, theta = ug.problems.control()

    @jax.jit
    def mean(theta):
        keys = jax.random.split(KEY, 1000)
        return jax.vmap(lambda k: ug.episode_loss(problem, k, theta))(keys).mean()

    np.testing.assert_allclose(mean(theta), 12.8, rtol=0.05)
    np.testing.assert_allclose(mean(np.array([0.0, 0.0, 20.0, 0.0], np.float32)), 0.094, rtol=0.2)
    np.testing.assert_allclose(mean(np.array(ug.problems.LQR_POLICY, np.float32)), 0.0039, rtol=0.3)
