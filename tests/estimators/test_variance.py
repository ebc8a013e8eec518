"""Variances of one antithetic pair against the closed forms, within five standard errors."""

import jax
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import build
from tests.statistics import Samples, window_gradients
from unrollgrad.problems import theory

pytestmark = pytest.mark.slow

STRUCTURES = {
    "identical": {"gradients": "identical"},
    "identical, full memory": {"gradients": "identical", "memory": 1.0},
    "independent": {"gradients": "independent"},
    "independent, full memory": {"gradients": "independent", "memory": 1.0},
    "decaying": {"gradients": "identical", "memory": 0.7, "init_influence": 1.0},
}


def example(structure, dim=5):
    return ug.problems.linear_recurrence(dim=dim, horizon=16, **STRUCTURES[structure])


def draw(name, structure, truncation, noise_period=None, num_episodes=60_000, num_pairs=1):
    problem, theta, influence = example(structure)
    estimator = build(
        name, problem, truncation=truncation, noise_period=noise_period, num_pairs=num_pairs
    )
    windows = 16 // (estimator.truncation or 16)
    grads = window_gradients(estimator, jax.random.key(11), theta, windows, num_episodes)
    return grads, influence(theta)


def agrees(measured, exact):
    value, se = measured
    assert se < 0.05 * exact, "not enough samples to tell"
    return abs(value - exact) < 5 * se


def rejects(measured, exact):
    value, se = measured
    return abs(value - exact) > 5 * se


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("name", "truncation"), [("full_es", 16), ("es_single", 4)])
def test_one_noise_per_episode(name, truncation, structure):
    grads, influence = draw(name, structure, truncation)
    g = theory.gradient(influence)
    exact = (5 + 1) * g @ g
    np.testing.assert_allclose(theory.episode_variance(influence, truncation), exact)
    assert agrees(Samples(grads.mean(axis=1)).variance(), exact)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("windows", [1, 4, 16])
def test_pes(windows, structure):
    truncation = 16 // windows
    grads, influence = draw("pes", structure, truncation)
    exact = theory.episode_variance(influence, truncation, noise_period=truncation)
    measured = Samples(grads.mean(axis=1)).variance()
    assert agrees(measured, exact)
    if windows == 16:  # the same test tells PES from ES-Single
        assert rejects(measured, theory.episode_variance(influence, truncation))


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("noise_period", [4, 6])
def test_gpes(noise_period, structure):
    grads, influence = draw("gpes", structure, 2, noise_period)
    exact = theory.episode_variance(influence, 2, noise_period)
    assert agrees(Samples(grads.mean(axis=1)).variance(), exact)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_truncated_es(structure):
    grads, influence = draw("truncated_es", structure, 4)
    exact = theory.truncated_variance(influence, 4)
    measured = Samples(grads.mean(axis=1)).variance()
    assert agrees(measured, exact)
    assert rejects(measured, theory.episode_variance(influence, 4, noise_period=4))  # PES's


@pytest.mark.parametrize("structure", ["identical", "independent", "decaying"])
@pytest.mark.parametrize(("name", "noise_period"), [("es_single", None), ("gpes", 8), ("pes", 2)])
def test_one_window_at_a_uniform_offset(name, noise_period, structure):
    grads, influence = draw(name, structure, 2, noise_period)
    g = theory.gradient(influence)
    exact = theory.window_variance(influence, 2, noise_period)
    # Windows of one worker are correlated: one uniformly drawn window per worker.
    chosen = np.random.default_rng(5).integers(8, size=len(grads))
    value, se = Samples(grads[np.arange(len(grads)), chosen]).mean_square()
    assert agrees((value - g @ g, se), exact)


def test_pairs_divide_the_variance():
    grads, influence = draw("pes", "decaying", 4, num_pairs=4)
    exact = theory.episode_variance(influence, 4, noise_period=4)
    measured = Samples(grads.mean(axis=1)).variance()
    assert agrees(measured, exact / 4)
    assert rejects(measured, exact)


def test_the_double_sum_on_known_structures():
    """Reference: P/2 (1 + 1/n) + 1/n times |g|^2 without memory and with agreeing windows."""
    for n in [1, 4, 16]:
        _, theta, influence = example("identical")
        g = theory.gradient(influence(theta))
        exact = theory.episode_variance(influence(theta), 16 // n, noise_period=16 // n)
        np.testing.assert_allclose(exact, (5 / 2 * (1 + 1 / n) + 1 / n) * g @ g)
