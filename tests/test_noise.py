"""Perturbation laws: unit covariance, stable draws, and a user's own."""

import jax
import jax.numpy as jnp
import numpy as np

import unrollgrad as ug

KEY = jax.random.key(0)


def test_gaussian_has_unit_covariance_over_leaves_and_pairs():
    theta = {"a": jnp.zeros(2), "b": jnp.zeros((1, 2), jnp.bfloat16)}
    unit = ug.noise.gaussian().sample(KEY, (), theta, 20_000)
    assert unit["b"].dtype == jnp.float32
    draws = np.concatenate([unit["a"], unit["b"].reshape(-1, 2)], axis=1)
    se = 1 / np.sqrt(len(draws))
    assert np.abs(draws.mean(axis=0)).max() < 5 * se
    assert np.abs(np.cov(draws.T) - np.eye(4)).max() < 5 * np.sqrt(2) * se
    # Fourth moments: Gaussian, not merely of unit variance.
    assert np.abs((draws**4).mean(axis=0) - 3).max() < 5 * np.sqrt(96) * se


def test_more_pairs_keep_the_first_draws():
    law, theta = ug.noise.gaussian(), jnp.zeros(3)
    np.testing.assert_array_equal(law.sample(KEY, (), theta, 2), law.sample(KEY, (), theta, 5)[:2])


def test_float64_leaves_are_perturbed_in_float64():
    with jax.enable_x64(True):
        unit = ug.noise.gaussian().sample(KEY, (), jnp.zeros(3, jnp.float64), 1)
        assert unit.dtype == jnp.float64


def test_a_law_is_any_pair_of_functions():
    """Fixed unit directions: the estimate is the exact gradient's component along them."""

    def sample(key, directions, theta, num_pairs):
        return jnp.broadcast_to(directions, (num_pairs, 3))

    problem, theta, influence = ug.problems.linear_recurrence(3, 4, memory=0.5)
    law = (lambda theta: jnp.array([0.0, 1.0, 0.0]), sample)
    estimator = ug.full_es(problem, sigma=0.1, noise=law)
    estimate, _ = estimator.estimate(KEY, theta, estimator.init(KEY, theta))
    exact = ug.problems.theory.gradient(influence(theta))
    np.testing.assert_allclose(estimate.grad, [0, exact[1], 0], rtol=1e-4, atol=1e-5)
