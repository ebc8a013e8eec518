"""Backpropagation inside evolution strategies: less variance, and bias only as documented."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import raises
from tests.statistics import Samples, sampler, window_gradients

FACTORIES = {
    "pes": ug.pes,
    "pes_analytic": ug.pes_analytic,
    "pes_analytic_replacement": ug.pes_analytic_replacement,
}


def samples(estimator, theta, num_windows, num_episodes):
    draws = window_gradients(estimator, jax.random.key(3), theta, num_windows, num_episodes)
    return Samples(draws.mean(axis=1))


def fading(memory):
    """A recurrence in which theta's influence on the loss decays by ``memory`` in every step."""
    slope = jnp.ones(20) / jnp.sqrt(20.0)

    def step(key, theta, s, t):
        s = memory * s + slope @ theta
        return s, s

    return ug.UnrolledProblem(lambda key, theta: jnp.float32(0.0), step, 10)


@functools.cache
def fading_program(name):
    return sampler(lambda memory: FACTORIES[name](fading(memory), truncation=1, sigma=0.1), 10)


@pytest.mark.parametrize(
    ("memory", "expected"),
    [(0.9, (12.6, 8.9, 7.3)), (0.5, (10.8, 2.6, 2.2)), (0.1, (11.1, 0.11, 0.09))],
)
def test_variance_against_memory(memory, expected):
    """Influence decays by ``memory`` per window, n = 10, P = 20: the reference's table 2.3."""
    # Theta enters step t with the weight 1 + memory + ... + memory^t.
    slope = np.mean(np.cumsum(memory ** np.arange(10)))
    exact = np.full(20, slope / np.sqrt(20))
    for name, value in zip(FACTORIES, expected, strict=True):
        draw = fading_program(name)
        s = Samples(draw(jax.random.key(3), 4000, np.zeros(20, np.float32), memory).mean(axis=1))
        variance, se = (x / np.sum(exact**2) for x in s.variance())
        assert se < 0.03 * value, name
        assert abs(variance - value) < 0.15 * value, (name, variance)
        assert s.error_in_se(exact) < 5, name


def test_the_window_gradient_is_that_of_the_state_the_worker_is_in():
    """Windows begin far from the episode's start; on a quadratic the replacement is exact."""

    def step(key, theta, s, t):
        s = 0.5 * s + theta
        return s, jnp.sum((s - 1) ** 2)

    problem = ug.UnrolledProblem(lambda key, theta: jnp.full(3, 20.0), step, 8)
    theta = np.array([0.3, -0.2, 0.1], np.float32)
    s, ds, exact = np.full(3, 20.0), 0.0, np.zeros(3)
    for _ in range(8):
        s, ds = 0.5 * s + theta, 0.5 * ds + 1
        exact += 2 * (s - 1) * ds / 8
    found = {
        name: samples(factory(problem, truncation=2, sigma=0.1, num_pairs=4), theta, 4, 5000)
        for name, factory in FACTORIES.items()
    }
    for name, s in found.items():
        assert s.relative_se(exact) < 0.02, name
        assert s.error_in_se(exact) < 5, name
    # A gradient at the episode's first state would add variance, and bias to the replacement.
    for name in ("pes_analytic", "pes_analytic_replacement"):
        assert found[name].variance()[0] < 0.5 * found["pes"].variance()[0], name


def test_the_control_variate_keeps_the_expectation_and_the_replacement_does_not():
    """For the loss exp(theta), smoothing multiplies the gradient by e^(sigma^2/2)."""
    sigma, theta = 0.5, np.array([0.1, -0.3], np.float32)

    def step(key, theta, s, t):
        return s, jnp.sum(jnp.exp(theta))

    problem = ug.UnrolledProblem(lambda key, theta: jnp.float32(0.0), step, 4)
    plain = np.exp(theta)
    smoothed = plain * np.exp(sigma**2 / 2)

    def draw(name):
        estimator = FACTORIES[name](problem, truncation=2, sigma=sigma, num_pairs=4)
        return samples(estimator, theta, 2, 10_000)

    for name in ["pes", "pes_analytic"]:
        s = draw(name)
        assert s.relative_se(smoothed) < 0.01
        assert s.error_in_se(smoothed) < 5, name
        assert s.error_in_se(plain) > 10, name
    replaced = draw("pes_analytic_replacement")
    assert replaced.error_in_se(smoothed) > 10
    assert replaced.error_in_se(plain) < 5


@pytest.mark.parametrize("name", FACTORIES)
def test_evaluate(name):
    """The evaluation at a window's start is multiplied by the noise before the window."""
    problem, theta, _ = ug.problems.linear_recurrence(dim=3, horizon=12, memory=0.9)
    final = ug.final_loss(problem, lambda key, theta, s: theta @ theta + s.sum())
    # Theta enters the state after twelve steps with the weight 1 + 0.9 + ... + 0.9^11.
    exact = 2 * np.asarray(theta) + np.sum(0.9 ** np.arange(12))
    s = samples(FACTORIES[name](final, truncation=2, sigma=0.1, num_pairs=4), theta, 6, 10_000)
    assert s.relative_se(exact) < 0.05
    assert s.error_in_se(exact) < 5


def oscillating(frequency):
    """A smooth loss with small, fast oscillations."""

    def step(key, theta, s, t):
        return s, jnp.sum(theta**2 + jnp.sin(frequency * theta) / 10)

    return ug.UnrolledProblem(lambda key, theta: jnp.float32(0.0), step, 2)


SIGMA = 0.3


@functools.cache
def oscillation_program(factory):
    return sampler(lambda frequency: factory(oscillating(frequency), sigma=SIGMA, num_pairs=8), 1)


@pytest.mark.parametrize("frequency", [3.0, 200.0])
def test_reparameterized_es(frequency):
    """It is unbiased for the episode-smoothed J and about as good as the better of its two parts."""
    theta = np.array([0.4, -0.2], np.float32)
    damped = np.exp(-((frequency * SIGMA) ** 2) / 2)
    plain, smoothed = (
        2 * theta + frequency / 10 * np.cos(frequency * theta) * factor for factor in (1, damped)
    )
    merged, es = (
        Samples(oscillation_program(factory)(jax.random.key(3), 10_000, theta, frequency))
        for factory in (ug.reparameterized_es, ug.full_es)
    )
    assert merged.relative_se(smoothed) < 0.05
    assert merged.error_in_se(smoothed) < 5
    assert merged.error_in_se(plain) > 10
    variance, alone = merged.variance()[0], es.variance()[0]
    assert variance < 1.3 * alone
    if frequency < 10:  # smooth: backpropagation dominates
        assert variance < 0.3 * alone


def test_a_sample_that_weighs_itself_is_biased():
    """Negative control: merging with weights from all samples, as in the papers, is biased."""
    sigma, pairs, episodes = 1.0, 3, 150_000

    def losses(x):
        return jnp.exp(x)

    def merge(key, own):
        u = jax.random.normal(key, (pairs,))
        e = u * (losses(sigma * u) - losses(-sigma * u)) / (2 * sigma)
        r = (jnp.exp(sigma * u) + jnp.exp(-sigma * u)) / 2
        if own:
            w = jnp.var(e) / (jnp.var(e) + jnp.var(r))
            return jnp.mean(w * r + (1 - w) * e)
        problem = ug.UnrolledProblem(
            lambda key, theta: jnp.float32(0.0), lambda key, theta, s, t: (s, jnp.exp(theta)), 1
        )
        estimator = ug.reparameterized_es(problem, sigma=sigma, num_pairs=pairs)
        theta = jnp.float32(0.0)
        return estimator.estimate(key, theta, estimator.init(key, theta))[0].grad

    truth = np.exp(sigma**2 / 2)
    keys = jax.random.split(jax.random.key(5), episodes)
    for own in (True, False):
        one = functools.partial(merge, own=own)
        s = Samples(jax.jit(lambda keys, one=one: jax.lax.map(one, keys, batch_size=4096))(keys))
        assert s.relative_se([truth]) < 0.01
        assert (s.error_in_se([truth]) > 10) == own


def test_too_few_pairs():
    problem, _ = ug.problems.influence_balancing(horizon=20)
    for pairs in (1, 2):
        with raises(ValueError, "`num_pairs` must be at least 3", f"got {pairs}"):
            ug.reparameterized_es(problem, sigma=0.1, num_pairs=pairs)


def test_gradients_that_explode_get_no_weight():
    """Backpropagated gradients overflow in every sample; evolution strategies do not."""

    def step(key, theta, s, t):
        # The value is 0 or 1; its derivative is infinite or NaN.
        return s, jnp.where(jnp.sqrt(jnp.abs(jnp.round(theta) * 0)) > 0, 0.0, theta)

    problem = ug.UnrolledProblem(lambda key, theta: jnp.float32(0.0), step, 2)
    theta = jnp.float32(1.0)
    estimator = ug.reparameterized_es(problem, sigma=0.1, num_pairs=8)
    estimate, _ = estimator.estimate(
        jax.random.key(0), theta, estimator.init(jax.random.key(0), theta)
    )
    assert np.isfinite(float(estimate.grad))
