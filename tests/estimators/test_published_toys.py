"""The toys of the PES and ES-Single papers give the published results."""

import jax
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments._framework.tuning import trajectory


def train(estimator, theta, optimizer, num_updates):
    """Returns theta before each update and after the last."""
    return trajectory(estimator, optimizer, jax.random.key(1), theta, num_updates)


BALANCING, DRIVE = ug.problems.influence_balancing(horizon=3000)


def balance(estimator, num_updates=3000):
    """Influence balancing: the loss after 500 steps at the trained theta, in NumPy."""
    theta = float(train(estimator, DRIVE, optax.sgd(1e-4), num_updates)[-1])
    matrix = 0.5 * (np.eye(23) + np.eye(23, k=1))
    drive, state = np.where(np.arange(23) < 10, 1.0, -1.0), np.ones(23)
    for _ in range(500):
        state = matrix @ state + theta * drive
    return 0.5 * (state[0] - 1) ** 2


@pytest.mark.parametrize("factory", [ug.pes, ug.es_single])
def test_influence_balancing_is_solved(factory):
    assert balance(factory(BALANCING, truncation=1, sigma=0.1, num_pairs=500)) < 1e-6


@pytest.mark.parametrize(("truncation", "num_updates"), [(1, 3000), (10, 1000)])
def test_influence_balancing_defeats_truncation(truncation, num_updates):
    """With windows of ten steps, a third of the updates moves theta that far away."""
    es = ug.truncated_es(BALANCING, truncation=truncation, sigma=0.1, num_pairs=500)
    assert balance(es, num_updates) > 100
    assert balance(ug.tbptt(BALANCING, truncation=truncation), num_updates) > 100


REGRESSION, RATES = ug.problems.toy_regression()


@jax.jit
def losses(thetas):
    return jax.vmap(lambda x: ug.episode_loss(REGRESSION, jax.random.key(0), x))(thetas)


def regress(estimator):
    """Toy regression: 100 J, averaged over the last 1000 of 4000 updates (published: 20,000)."""
    path = train(estimator, RATES, optax.adam(1e-2, b1=0.99, b2=0.999), 4000)
    return 100 * np.asarray(losses(path[-1000:])).mean()


@pytest.mark.parametrize("factory", [ug.pes, ug.es_single])
def test_toy_regression_is_solved(factory):
    assert regress(factory(REGRESSION, truncation=10, sigma=0.3, num_pairs=50)) < 580


def test_toy_regression_defeats_truncation():
    assert regress(ug.truncated_es(REGRESSION, truncation=10, sigma=1.0, num_pairs=50)) > 1300
    assert regress(ug.tbptt(REGRESSION, truncation=10)) > 2400
