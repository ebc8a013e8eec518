"""The toys of the PES and ES-Single papers come out as published (reference 2.6, 2.7)."""

import jax
import optax
import pytest

import unrollgrad as ug
from experiments.training import trajectory

pytestmark = pytest.mark.slow


def train(estimator, theta, optimizer, num_updates):
    """Returns all thetas, those before each update and the last."""
    return trajectory(estimator, optimizer, jax.random.key(1), theta, num_updates)[0]


def balance(make):
    """Influence balancing: the loss after 500 steps at theta after 3000 updates."""
    problem, theta = ug.problems.influence_balancing(horizon=3000)
    theta = train(make(problem), theta, optax.sgd(1e-4), 3000)[-1]
    test = problem._replace(horizon=500)
    final = ug.final_loss(test, lambda key, theta, s: 0.5 * (s[0] - 1) ** 2)
    return float(ug.episode_loss(final, jax.random.key(0), theta))


@pytest.mark.parametrize("factory", [ug.pes, ug.es_single])
def test_influence_balancing_is_solved(factory):
    assert balance(lambda p: factory(p, truncation=1, sigma=0.1, num_pairs=500)) < 1e-6


@pytest.mark.parametrize("truncation", [1, 10])
def test_influence_balancing_defeats_truncation(truncation):
    es = balance(lambda p: ug.truncated_es(p, truncation=truncation, sigma=0.1, num_pairs=500))
    bp = balance(lambda p: ug.tbptt(p, truncation=truncation))
    assert es > 100
    assert bp > 100


def regress(make):
    """Toy regression: 100 J, the mean over the last 1000 of 20k updates."""
    problem, theta = ug.problems.toy_regression()
    path = train(make(problem), theta, optax.adam(1e-2, b1=0.99, b2=0.999), 20_000)
    losses = jax.vmap(lambda x: ug.episode_loss(problem, jax.random.key(0), x))(path[-1000:])
    return 100 * float(losses.mean())


@pytest.mark.parametrize("factory", [ug.pes, ug.es_single])
def test_toy_regression_is_solved(factory):
    assert regress(lambda p: factory(p, truncation=10, sigma=0.3, num_pairs=50)) < 580


def test_toy_regression_defeats_truncation():
    assert regress(lambda p: ug.truncated_es(p, truncation=10, sigma=1.0, num_pairs=50)) > 1300
    assert regress(lambda p: ug.tbptt(p, truncation=10)) > 2400
