"""Window influence by reverse mode equals the recurrence's known influence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from experiments.estimators.window_influence import window_influence
from unrollgrad.problems import theory

EXAMPLE = ug.problems.linear_recurrence(
    3, 8, gradients="independent", memory=0.7, curvature=0.2, init_influence=0.5
)


def test_it_is_the_sum_over_the_steps_of_the_windows():
    by_step = EXAMPLE.influence(EXAMPLE.theta)
    expected = np.zeros((4, 4, 3))
    for t in range(8):
        for tau in range(8):
            expected[t // 2, tau // 2] += by_step[t, tau] / 2
    measured = window_influence(EXAMPLE.problem, jax.random.key(0), EXAMPLE.theta, 4)
    np.testing.assert_allclose(measured, expected, rtol=1e-5, atol=1e-6)


def test_theory_reads_it_as_it_reads_steps():
    by_step = EXAMPLE.influence(EXAMPLE.theta)
    measured = window_influence(EXAMPLE.problem, jax.random.key(0), EXAMPLE.theta, 4)
    np.testing.assert_allclose(theory.gradient(measured), theory.gradient(by_step), rtol=1e-5)
    for windows, period in [(1, None), (1, 1), (1, 2), (2, 2)]:
        got = theory.episode_variance(measured, windows, period)
        known = theory.episode_variance(by_step, 2 * windows, period and 2 * period)
        assert got == pytest.approx(known, rel=1e-5)


def test_trees_and_streaming_data():
    def step(key, theta, state, t, batch):
        state = state + theta["a"] * batch
        return state, jnp.sum(state) * theta["b"][0]

    problem = ug.UnrolledProblem(lambda key, theta: jnp.zeros(2), step, 2)
    theta = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}
    data = jnp.array([[1.0, 10.0], [100.0, 1000.0]])
    measured = window_influence(problem, jax.random.key(0), theta, 2, data)
    # s_1 = a x_0, s_2 = a x_0 + a' x_1: losses b (1 + 20) and b' (1 + 20 + 100 + 2000)
    expected = [[[3, 30, 21], [0, 0, 0]], [[3, 30, 0], [300, 3000, 2121]]]
    np.testing.assert_allclose(measured, expected)


def test_windows_that_do_not_fit():
    with pytest.raises(ValueError, match="must divide the horizon; got 3 and 8"):
        window_influence(EXAMPLE.problem, jax.random.key(0), EXAMPLE.theta, 3)
