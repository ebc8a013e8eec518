"""The canonical problems are what their docstrings say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from unrollgrad.problems import theory

KEY = jax.random.key(0)


def loss(problem, theta):
    return float(ug.episode_loss(problem, KEY, theta))


def test_influence_balancing():
    problem, theta = ug.problems.influence_balancing(horizon=500)
    final = ug.final_loss(problem, lambda key, theta, s: 0.5 * (s[0] - 1) ** 2)
    np.testing.assert_allclose(loss(final, theta), 8.0, rtol=1e-4)
    assert loss(final, jnp.float32(-1 / 6)) < 1e-8
    sensitivity = {1: 1, 5: 5, 10: 10, 20: 16.5, 30: 9.9, 40: 0.57, 60: -5.9, 100: -6.0}
    for steps, expected in sensitivity.items():
        short = problem._replace(horizon=steps, init=lambda key, theta: jnp.zeros(23))
        reach = ug.final_loss(short, lambda key, theta, s: s[0])
        slope = jax.grad(lambda x: ug.episode_loss(reach, KEY, x))(theta)  # noqa: B023
        np.testing.assert_allclose(slope, expected, rtol=0.02)


def test_toy_regression():
    problem, theta = ug.problems.toy_regression()
    np.testing.assert_allclose(100 * loss(problem, theta), 2488, atol=1)
    axis = jnp.linspace(-5, 5, 201)
    grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    losses = 100 * jax.vmap(lambda x: ug.episode_loss(problem, KEY, x))(grid)
    assert 545 < float(jnp.nanmin(losses)) < 575


@pytest.mark.parametrize("gradients", ["identical", "independent"])
@pytest.mark.parametrize("init_influence", [0.0, 2.0])
def test_linear_recurrence_influence(gradients, init_influence):
    """Against jax.grad with a theta of its own for every step."""
    problem, theta, influence = ug.problems.linear_recurrence(
        3, 5, gradients=gradients, memory=0.6, curvature=0.3, init_influence=init_influence
    )

    def losses(thetas):
        state, out = problem.init(KEY, thetas[0]), []
        for t in range(5):
            state, value = problem.step(KEY, thetas[t], state, t)
            out.append(value)
        return jnp.stack(out)

    by_grad = jax.jacobian(losses)(jnp.broadcast_to(theta, (5, 3)))
    np.testing.assert_allclose(influence(theta), by_grad, rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda x: ug.episode_loss(problem, KEY, x))(theta)
    np.testing.assert_allclose(theory.gradient(influence(theta)), gradient, rtol=1e-4)


def test_linear_recurrence_refuses_other_gradients():
    with pytest.raises(ValueError, match="'other'"):
        ug.problems.linear_recurrence(gradients="other")


@pytest.mark.parametrize(("theta", "exponent"), [(3.2, -0.916), (3.9, 0.495), (4.0, 0.693)])
def test_chaotic_map_has_its_lyapunov_exponents(theta, exponent):
    problem, _ = ug.problems.chaotic_map(horizon=20_000)

    def step(x, t):
        after, _ = problem.step(KEY, jnp.float32(theta), x, t)
        return after, jnp.log(jnp.abs(theta * (1 - 2 * x)))

    _, logs = jax.lax.scan(step, jnp.float32(0.3), jnp.arange(20_000))
    np.testing.assert_allclose(logs.mean(), exponent, atol=0.03)


def test_chaotic_map_explodes_backwards_and_leaves_beyond_four():
    problem, theta = ug.problems.chaotic_map()
    gradient = jax.grad(lambda x: ug.episode_loss(problem, KEY, x))(theta)
    assert abs(gradient) > 1e10
    assert not np.isfinite(loss(problem, jnp.float32(4.1)))


def test_lorenz():
    for horizon, expected in [(100, 750.07), (500, 322.06)]:
        problem, theta = ug.problems.lorenz(horizon)
        np.testing.assert_allclose(loss(problem, theta), expected, rtol=1e-3)
        assert loss(problem, jnp.log(jnp.array([10.0, 28.0]))) < 1e-6
    with jax.enable_x64(True):
        problem, theta = ug.problems.lorenz()
        np.testing.assert_allclose(loss(problem, jnp.array([3.116, 3.7], float)), 353.3, rtol=1e-3)


def test_control():
    problem, theta = ug.problems.control()
    keys = jax.random.split(KEY, 1000)

    def mean(theta):
        return float(jax.vmap(lambda k: ug.episode_loss(problem, k, theta))(keys).mean())

    np.testing.assert_allclose(mean(theta), 12.8, rtol=0.05)
    np.testing.assert_allclose(mean(jnp.array([0.0, 0.0, 20.0, 0.0])), 0.094, rtol=0.2)
    np.testing.assert_allclose(mean(jnp.array(ug.problems.LQR_POLICY)), 0.0039, rtol=0.3)
