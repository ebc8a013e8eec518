"""The noise at a frozen theta has its closed form, and Adam stays as far away as it says."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments.estimators import adam_noise
from unrollgrad.problems import theory


@pytest.mark.experiments
@pytest.mark.parametrize("name", ["pes", "es_single"])
def test_the_variance_of_an_episode(name):
    """pes has many times the variance of es_single where the windows' gradients differ."""
    example = ug.problems.linear_recurrence(dim=2, horizon=20, gradients="independent")
    estimator = ug.REGISTRY[name].build(example.problem, truncation=1, sigma=0.1, num_pairs=1)
    found = adam_noise.noise(estimator, 20, 4000, jax.random.key(0), example.theta)
    influence, period = example.influence(example.theta), 1 if name == "pes" else None
    exact = theory.episode_variance(influence, 1, period)
    assert found.variance.sum() == pytest.approx(exact, rel=0.15)
    other = theory.episode_variance(influence, 1, None if period else 1)
    assert abs(found.variance.sum() / other - 1) > 0.5
    assert adam_noise.excess(found, 0.02) == pytest.approx(2 * adam_noise.excess(found, 0.01))


@pytest.mark.experiments
def test_adam_stays_this_far_from_the_minimum():
    """J = h theta^2 / 2 with white noise of standard deviation s: the excess is a s / 4."""
    rate, optimizer = 0.003, optax.adam(0.003)

    def run(key, curvature, spread):
        def update(at, k):
            theta, state = at
            grad = curvature * theta + spread * jax.random.normal(jax.random.fold_in(key, k))
            updates, state = optimizer.update(grad, state, theta)
            return (theta + updates, state), curvature * theta**2 / 2

        begin = jnp.zeros(()), optimizer.init(jnp.zeros(()))
        _, losses = jax.lax.scan(update, begin, jnp.arange(12_000))
        return losses[6000:].mean()

    keys = jax.random.split(jax.random.key(0), 200)
    curvatures, spreads = jnp.array([1.0, 1.0, 4.0]), jnp.array([2.0, 4.0, 4.0])
    found = jax.jit(jax.vmap(jax.vmap(run, (0, None, None)), (None, 0, 0)))(
        keys, curvatures, spreads
    )
    windows = [adam_noise.Noise(np.array([s**2]), np.array([s**2]), 1) for s in spreads]
    expected = [adam_noise.excess(white, rate) for white in windows]
    np.testing.assert_allclose(np.asarray(found).mean(axis=1), expected, rtol=0.1)
