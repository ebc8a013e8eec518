"""Perturbation laws: unit covariance, stable draws, and a user's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import quadratic, raises, settings
from tests.statistics import Samples, window_gradients
from unrollgrad.estimators import REGISTRY

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


def test_a_large_leaf_is_drawn_in_blocks_that_differ():
    size = 2**17 + 3  # three blocks, none of which is full
    unit = np.asarray(ug.noise.gaussian().sample(KEY, (), {"w": jnp.zeros((size, 1))}, 2)["w"])
    assert unit.shape == (2, size, 1)
    blocks = unit.reshape(2, size)[:, : size - size % 3].reshape(6, -1)
    se = 1 / np.sqrt(blocks.shape[1])
    assert np.abs(blocks.mean(axis=1)).max() < 5 * se
    assert np.abs(np.cov(blocks) - np.eye(6)).max() < 5 * np.sqrt(2) * se


def test_small_leaves_are_drawn_together():
    """Neighbours that fit a block: one draw. Every coordinate is still one of its own."""
    sizes = {"a": 3, "b": 2**16 - 3, "c": 2, "d": 2**16 - 1, "e": 4}
    theta = {name: jnp.zeros(size) for name, size in sizes.items()}
    draw = lambda theta: ug.noise.gaussian().sample(KEY, (), theta, 2)  # noqa: E731
    draws = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(draw(theta))])
    assert len(np.unique(draws)) > 0.98 * len(draws)  # float32 has few numbers near 1
    assert abs(draws.mean()) < 5 / np.sqrt(len(draws))
    in_one = {k: theta[k] for k in "ab"}
    assert str(jax.make_jaxpr(draw)(theta)).count("erf_inv") == 4
    assert str(jax.make_jaxpr(draw)(in_one)).count("erf_inv") == 1


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


def linear(dim):
    slope = jax.random.normal(KEY, (dim,))
    problem = ug.UnrolledProblem(
        lambda key, theta: jnp.float32(0.0), lambda key, theta, s, t: (s, slope @ theta), 1
    )
    return problem, jnp.zeros(dim), np.asarray(slope)


@pytest.mark.parametrize("num_pairs", [1, 4, 8])
@pytest.mark.parametrize(
    ("law", "normalised"),
    [
        (ug.noise.gaussian(), lambda p, m: (p + 1) / m),
        (ug.noise.rademacher(), lambda p, m: (p - 1) / m),
        (ug.noise.orthogonal(), lambda p, m: p / m - 1),
    ],
    ids=["gaussian", "rademacher", "orthogonal"],
)
def test_variance_on_a_linear_loss(law, normalised, num_pairs):
    problem, theta, slope = linear(8)
    estimator = ug.full_es(problem, sigma=0.5, num_pairs=num_pairs, noise=law)
    s = Samples(window_gradients(estimator, KEY, theta, 1, 40_000))
    size = np.sum(slope**2)
    variance, se = (x / size for x in s.variance())
    expected = normalised(8, num_pairs)
    if expected == 0:  # as many orthogonal directions as numbers: the gradient itself
        np.testing.assert_allclose(s.x, np.broadcast_to(slope, s.x.shape), rtol=1e-3, atol=1e-4)
        return
    assert s.error_in_se(slope) < 5
    assert se < 0.03 * expected
    assert abs(variance - expected) < 5 * se
    assert abs(variance - (8 + 3) / num_pairs) > 10 * se


@pytest.mark.parametrize("law", [ug.noise.rademacher(), ug.noise.orthogonal()])
def test_unit_covariance_over_mixed_leaves(law):
    theta = {"a": jnp.zeros(2), "b": jnp.zeros((1, 2), jnp.bfloat16)}
    draw = jax.vmap(lambda key: law.sample(key, law.init(theta), theta, 6))
    unit = draw(jax.random.split(KEY, 20_000))
    assert unit["b"].dtype == jnp.float32
    assert unit["b"].shape == (20_000, 6, 1, 2)
    for pair in (0, 5):  # the sixth is in a second block of orthogonal directions
        draws = np.concatenate([unit["a"][:, pair], unit["b"][:, pair, 0]], axis=1)
        se = 1 / np.sqrt(len(draws))
        assert np.abs(draws.mean(axis=0)).max() < 5 * se
        assert np.abs(draws.T @ draws / len(draws) - np.eye(4)).max() < 5 * np.sqrt(2) * se


def test_orthogonal_in_blocks():
    law, theta = ug.noise.orthogonal(), jnp.zeros((2, 2))
    rows = np.asarray(law.sample(KEY, (), theta, 7)).reshape(7, 4)
    gram = rows @ rows.T
    np.testing.assert_allclose(gram[:4, :4], 4 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(gram[4:, 4:], 4 * np.eye(3), atol=1e-5)
    assert np.abs(gram[:4, 4:]).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("law", [ug.noise.rademacher(), ug.noise.orthogonal()])
@pytest.mark.parametrize("name", ["full_es", "truncated_es", "pes", "es_single", "gpes"])
def test_every_estimator_takes_every_law(name, law):
    problem, theta, influence = ug.problems.linear_recurrence(dim=4, horizon=20, memory=0.8)
    estimator = REGISTRY[name].build(problem, **settings(num_pairs=3), noise=law)
    windows = 20 // (estimator.truncation or 20)
    draws = window_gradients(estimator, jax.random.key(7), theta, windows, 20_000)
    exact = influence(theta)
    truth = ug.problems.theory.gradient(exact)
    if name == "truncated_es":
        truth = ug.problems.theory.truncated_gradient(exact, truncation=5)
    s = Samples(draws.mean(axis=1))
    assert s.relative_se(truth) < 0.05
    assert s.error_in_se(truth) < 5


def test_a_law_that_draws_something_else():
    problem, theta = quadratic()
    single = ug.noise.Noise(lambda theta: None, lambda key, state, theta, n: theta)
    other = ug.noise.Noise(lambda theta: None, lambda key, state, theta, n: {"a": jnp.ones(n)})
    for law in (single, other):
        estimator = ug.pes(problem, truncation=5, sigma=0.1, num_pairs=4, noise=law)
        state = estimator.init(jax.random.key(0), theta)
        with raises(TypeError, "`noise`", "num_pairs=4", "['log_rate']", "expected (4,)"):
            estimator.estimate(jax.random.key(0), theta, state)
