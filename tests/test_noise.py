"""Perturbation laws: unit covariance, stable draws, and a user's own laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import mistyped, quadratic, raises, settings
from tests.statistics import Samples, window_gradients
from unrollgrad.estimators import REGISTRY

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=(0, 2))
def draw(law, theta, num_pairs):
    return law.sample(KEY, law.init(theta), theta, num_pairs)


def test_gaussian_has_unit_covariance_over_leaves_and_pairs():
    theta = {"a": np.zeros(2, np.float32), "b": np.zeros((1, 2), jnp.bfloat16)}
    unit = draw(ug.noise.gaussian(), theta, 20_000)
    assert unit["b"].dtype == jnp.float32
    draws = np.concatenate([unit["a"], np.asarray(unit["b"]).reshape(-1, 2)], axis=1)
    se = 1 / np.sqrt(len(draws))
    assert np.abs(draws.mean(axis=0)).max() < 5 * se
    assert np.abs(np.cov(draws.T) - np.eye(4)).max() < 5 * np.sqrt(2) * se
    # Fourth moments show a Gaussian, not only unit variance.
    assert np.abs((draws**4).mean(axis=0) - 3).max() < 5 * np.sqrt(96) * se


def test_more_pairs_keep_the_first_draws():
    law, theta = ug.noise.gaussian(), np.zeros(3, np.float32)
    np.testing.assert_array_equal(draw(law, theta, 2), np.asarray(draw(law, theta, 5))[:2])


def test_a_large_leaf_is_drawn_in_blocks_that_differ():
    size = 2**16 + 3  # three blocks, none of them full
    theta = {"w": np.zeros((size, 1), np.float32)}
    unit = np.asarray(draw(ug.noise.gaussian(), theta, 2)["w"])
    assert unit.shape == (2, size, 1)
    blocks = unit.reshape(2, size)[:, : size - size % 3].reshape(6, -1)
    se = 1 / np.sqrt(blocks.shape[1])
    assert np.abs(blocks.mean(axis=1)).max() < 5 * se
    assert np.abs(np.cov(blocks) - np.eye(6)).max() < 5 * np.sqrt(2) * se


def test_small_leaves_are_drawn_together():
    """Neighbouring leaves that fit a block share one draw; coordinates stay distinct."""
    sizes = {"a": 3, "b": 2**15 - 3, "c": 2, "d": 2**15 - 1, "e": 4}
    theta = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    two = functools.partial(draw, ug.noise.gaussian(), num_pairs=2)
    draws = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(two(theta))])
    assert len(np.unique(draws)) > 0.98 * len(draws)  # float32 has few numbers near 1
    assert abs(draws.mean()) < 5 / np.sqrt(len(draws))
    in_one = {k: theta[k] for k in "ab"}
    assert str(jax.make_jaxpr(two)(theta)).count("erf_inv") == 4
    assert str(jax.make_jaxpr(two)(in_one)).count("erf_inv") == 1


def test_float64_leaves_are_perturbed_in_float64():
    with jax.enable_x64(True):
        unit = jax.eval_shape(lambda x: draw(ug.noise.gaussian(), x, 1), np.zeros(3, np.float64))
        assert unit.dtype == jnp.float64


def test_a_law_is_any_pair_of_functions():
    """With a fixed unit direction the estimate is the exact gradient's component along it."""

    def sample(key, directions, theta, num_pairs):
        return jnp.broadcast_to(directions, (num_pairs, 3))

    problem, theta, influence = ug.problems.linear_recurrence(3, 4, memory=0.5)
    law = (lambda theta: jnp.array([0.0, 1.0, 0.0]), sample)
    estimator = ug.full_es(problem, sigma=0.1, noise=mistyped(law))
    estimate, _ = estimator.estimate(KEY, theta, estimator.init(KEY, theta))
    exact = ug.problems.theory.gradient(influence(theta))
    np.testing.assert_allclose(estimate.grad, [0, exact[1], 0], rtol=1e-4, atol=1e-5)


def linear(dim):
    slope = np.random.default_rng(0).normal(size=dim).astype(np.float32)
    problem = ug.UnrolledProblem(
        lambda key, theta: jnp.float32(0.0), lambda key, theta, s, t: (s, slope @ theta), 1
    )
    return problem, np.zeros(dim, np.float32), slope


LAWS = {
    "gaussian": ug.noise.gaussian(),
    "rademacher": ug.noise.rademacher(),
    "orthogonal": ug.noise.orthogonal(),
}


@pytest.mark.parametrize(
    ("law", "num_pairs", "expected"),
    [
        ("gaussian", 1, 9),  # (P + 1) / M
        ("gaussian", 4, 9 / 4),
        ("rademacher", 1, 7),  # (P - 1) / M
        ("rademacher", 4, 7 / 4),
        ("orthogonal", 1, 7),  # P / M - 1
        ("orthogonal", 4, 1),
        ("orthogonal", 8, 0),
    ],
)
def test_variance_on_a_linear_loss(law, num_pairs, expected):
    """The variance for P = 8, divided by |g|^2."""
    problem, theta, slope = linear(8)
    estimator = ug.full_es(problem, sigma=0.5, num_pairs=num_pairs, noise=LAWS[law])
    s = Samples(window_gradients(estimator, KEY, theta, 1, 10_000))
    size = np.sum(slope**2)
    variance, se = (x / size for x in s.variance())
    if expected == 0:  # as many orthogonal directions as numbers give the gradient
        np.testing.assert_allclose(s.x, np.broadcast_to(slope, s.x.shape), rtol=1e-3, atol=1e-4)
        return
    assert s.error_in_se(slope) < 5
    assert se < 0.03 * expected
    assert abs(variance - expected) < 5 * se
    assert abs(variance - (8 + 3) / num_pairs) > 10 * se


@pytest.mark.parametrize("law", ["rademacher", "orthogonal"])
def test_unit_covariance_over_mixed_leaves(law):
    law = LAWS[law]
    theta = {"a": np.zeros(2, np.float32), "b": np.zeros((1, 2), jnp.bfloat16)}

    @jax.jit
    def many(key):
        keys = jax.random.split(key, 20_000)
        return jax.vmap(lambda key: law.sample(key, law.init(theta), theta, 6))(keys)

    unit = jax.tree.map(np.asarray, many(KEY))
    assert unit["b"].dtype == jnp.float32
    assert unit["b"].shape == (20_000, 6, 1, 2)
    for pair in (0, 5):  # the sixth pair is in a second orthogonal block
        draws = np.concatenate([unit["a"][:, pair], unit["b"][:, pair, 0]], axis=1)
        se = 1 / np.sqrt(len(draws))
        assert np.abs(draws.mean(axis=0)).max() < 5 * se
        assert np.abs(draws.T @ draws / len(draws) - np.eye(4)).max() < 5 * np.sqrt(2) * se


def test_orthogonal_in_blocks():
    rows = np.asarray(draw(ug.noise.orthogonal(), np.zeros((2, 2), np.float32), 7)).reshape(7, 4)
    gram = rows @ rows.T
    np.testing.assert_allclose(gram[:4, :4], 4 * np.eye(4), atol=1e-5)
    np.testing.assert_allclose(gram[4:, 4:], 4 * np.eye(3), atol=1e-5)
    assert np.abs(gram[:4, 4:]).max() > 0.1


TAKE_A_LAW = [name for name, row in REGISTRY.items() if row.takes("noise")]


@pytest.mark.parametrize("law", ["rademacher", "orthogonal"])
@pytest.mark.parametrize("name", ["full_es", "truncated_es", "gpes"])
def test_every_law_is_unbiased(name, law):
    problem, theta, influence = ug.problems.linear_recurrence(dim=4, horizon=20, memory=0.8)
    estimator = REGISTRY[name].build(problem, **settings(num_pairs=3), noise=LAWS[law])
    windows = 20 // (estimator.truncation or 20)
    draws = window_gradients(estimator, jax.random.key(7), theta, windows, 5000)
    exact = influence(theta)
    truth = ug.problems.theory.gradient(exact)
    if name == "truncated_es":
        truth = ug.problems.theory.truncated_gradient(exact, truncation=5)
    s = Samples(draws.mean(axis=1))
    assert s.relative_se(truth) < 0.05
    assert s.error_in_se(truth) < 5


@pytest.mark.parametrize("name", TAKE_A_LAW)
def test_every_estimator_draws_from_its_law(name):
    """The law gets its own ``law_state`` and draws for all pairs; nothing else perturbs theta."""
    asked = []

    def sample(key, law_state, theta, num_pairs):
        asked.append((law_state, num_pairs))
        return law.sample(key, (), theta, num_pairs)

    problem, theta = quadratic()
    law = ug.noise.gaussian()
    watched = ug.noise.Noise(lambda theta: "of the law", sample)
    estimator = REGISTRY[name].build(problem, **settings(num_pairs=3), noise=watched)
    state = jax.eval_shape(estimator.init, KEY, theta)
    jax.eval_shape(estimator.estimate, KEY, theta, state)
    assert set(asked) == {("of the law", 3)}


def test_a_law_that_draws_something_else():
    problem, theta = quadratic()
    single = ug.noise.Noise(lambda theta: None, lambda key, state, theta, n: theta)
    other = ug.noise.Noise(lambda theta: None, lambda key, state, theta, n: {"a": jnp.ones(n)})
    for law in (single, other):
        estimator = ug.pes(problem, truncation=5, sigma=0.1, num_pairs=4, noise=law)
        state = jax.eval_shape(estimator.init, KEY, theta)
        with raises(TypeError, "`noise`", "num_pairs=4", "['log_rate']", "expected (4,)"):
            jax.eval_shape(estimator.estimate, KEY, theta, state)
