"""Expectations, against closed forms, with power and with estimators that must be rejected."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.helpers import build
from tests.statistics import Samples, window_gradients
from unrollgrad.problems import theory

pytestmark = pytest.mark.slow

EPISODES = 40_000
UNBIASED = ["full_es", "pes", "es_single", "gpes"]


def recurrence(init_influence):
    return ug.problems.linear_recurrence(
        dim=4, horizon=20, memory=0.8, curvature=0.1, init_influence=init_influence
    )


def samples(name, problem, theta, num_episodes=EPISODES, truncation=5, **changes):
    estimator = build(name, problem, truncation=truncation, num_pairs=4, **changes)
    windows = problem.horizon // (estimator.truncation or problem.horizon)
    draws = window_gradients(estimator, jax.random.key(7), theta, windows, num_episodes)
    return Samples(draws.mean(axis=1))


def is_unbiased(s, truth):
    """The test of every unbiased estimator: it has power, and the mean is the truth."""
    assert s.relative_se(truth) < 0.05, "not enough samples to tell"
    return s.error_in_se(truth) < 5


def is_rejected(s, truth):
    return not s.error_in_se(truth) < 5


@pytest.mark.parametrize("init_influence", [0.0, 2.0])
@pytest.mark.parametrize("name", UNBIASED)
def test_linear_recurrence(name, init_influence):
    problem, theta, influence = recurrence(init_influence)
    truth = theory.gradient(influence(theta))
    assert is_unbiased(samples(name, problem, theta), truth)


@pytest.mark.parametrize("init_influence", [0.0, 2.0])
def test_linear_recurrence_rejects_truncation(init_influence):
    problem, theta, influence = recurrence(init_influence)
    exact = influence(theta)
    truth = theory.gradient(exact)
    tbptt = samples("tbptt", problem, theta, num_episodes=3)
    assert tbptt.relative_error(truth) > 0.2
    truncated = samples("truncated_es", problem, theta)
    assert is_rejected(truncated, truth)
    assert truncated.error_in_se(truth) > 20
    # Both are biased in just the way the closed form says.
    biased = theory.truncated_gradient(exact, truncation=5)
    np.testing.assert_allclose(tbptt.mean, biased, rtol=1e-5)
    assert is_unbiased(truncated, biased)


def test_the_gradient_through_init_is_seen():
    """Negative control: the truth without the initial state's influence is rejected."""
    problem, theta, influence = recurrence(2.0)
    wrong = theory.gradient(recurrence(0.0).influence(theta))
    truth = theory.gradient(influence(theta))
    for name in UNBIASED:
        assert is_rejected(samples(name, problem, theta), wrong)
    bptt = samples("bptt", problem, theta, num_episodes=3)
    np.testing.assert_allclose(bptt.mean, truth, rtol=1e-5)
    assert bptt.relative_error(wrong) > 0.1


def influence_balancing_truth(horizon, theta=0.5):
    """J and its derivative by the sensitivity recursion, in NumPy."""
    matrix = 0.5 * (np.eye(23) + np.eye(23, k=1))
    drive = np.where(np.arange(23) < 10, 1.0, -1.0)
    s, ds, total = np.ones(23), np.zeros(23), 0.0
    for _ in range(horizon):
        s, ds = matrix @ s + theta * drive, matrix @ ds + drive
        total += (s[0] - 1) * ds[0]
    return total / horizon, (s[0] - 1) * ds[0]


@pytest.mark.parametrize("name", UNBIASED)
def test_influence_balancing(name):
    problem, theta = ug.problems.influence_balancing(horizon=100)
    truth, _ = influence_balancing_truth(100)
    s = samples(name, problem, theta, num_episodes=20_000, truncation=10, noise_period=50)
    assert is_unbiased(s, [truth])


def test_influence_balancing_rejects_truncation():
    problem, theta = ug.problems.influence_balancing(horizon=100)
    truth, _ = influence_balancing_truth(100)
    bptt = samples("bptt", problem, theta, num_episodes=3)
    np.testing.assert_allclose(bptt.mean, truth, rtol=1e-5)
    tbptt = samples("tbptt", problem, theta, num_episodes=3, truncation=10)
    assert tbptt.relative_error([truth]) > 0.2
    truncated = samples("truncated_es", problem, theta, num_episodes=20_000, truncation=10)
    assert truncated.error_in_se([truth]) > 20


@pytest.mark.parametrize("name", ["full_es", "pes", "es_single", "gpes"])
def test_final_loss(name):
    """The gradient of the final loss itself, not of it over T."""
    problem, theta = ug.problems.influence_balancing(horizon=60)
    final = ug.final_loss(problem, lambda key, theta, s: 0.5 * (s[0] - 1) ** 2)
    _, truth = influence_balancing_truth(60)
    s = samples(name, final, theta, num_episodes=20_000, truncation=10, noise_period=20)
    assert is_unbiased(s, [truth])
    assert is_rejected(s, [truth / 60])


def test_final_loss_that_depends_on_theta_directly():
    """The direct term of ``evaluate`` counts once, not once per window."""
    problem, theta, _ = ug.problems.linear_recurrence(dim=3, horizon=12, memory=0.9)
    final = ug.final_loss(problem, lambda key, theta, s: theta @ theta + s.sum())
    exact = jax.grad(lambda x: ug.episode_loss(final, jax.random.key(0), x))(theta)
    for name in ["pes", "es_single", "gpes"]:
        s = samples(name, final, theta, truncation=2, noise_period=4)
        assert is_unbiased(s, exact), name
    direct = ug.final_loss(problem, lambda key, theta, s: theta @ theta)
    tbptt = samples("tbptt", direct, theta, num_episodes=3, truncation=2)
    np.testing.assert_allclose(tbptt.mean, 2 * theta, rtol=1e-5)
    assert is_unbiased(samples("truncated_es", direct, theta, truncation=2), 2 * theta)


def test_a_loss_that_is_not_quadratic():
    """Full ES and ES-Single have the gradient of the smoothed J, not of J."""
    sigma = 0.5

    def init(key, theta):
        return jnp.zeros(2)

    def step(key, theta, state, t):
        return state + theta, jnp.sum(jnp.exp(state + theta))

    problem, theta = ug.UnrolledProblem(init, step, 4), jnp.array([0.1, -0.3])
    t = np.arange(1, 5)[:, None]
    x = np.asarray(theta)
    smoothed = (t * np.exp(t * x + (t * sigma) ** 2 / 2)).mean(axis=0)
    plain = (t * np.exp(t * x)).mean(axis=0)
    for name in ["full_es", "es_single"]:
        s = samples(name, problem, theta, num_episodes=400_000, truncation=2, sigma=sigma)
        assert is_unbiased(s, smoothed), name
        assert is_rejected(s, plain), name


def test_sampled_horizon_weighs_every_window_equally():
    """J = E[sum of losses] / E[T]: the mean over all windows a worker spends."""
    problem, theta, influence = ug.problems.linear_recurrence(dim=2, horizon=12, memory=0.7)
    lengths = [4, 8, 12]
    exact = influence(theta)
    truth = sum(exact[:n].sum(axis=(0, 1)) for n in lengths) / sum(lengths)

    def horizon(key):
        return jax.random.choice(key, jnp.array([3, 7, 12]))  # rounded up to 4, 8, 12

    sampled = problem._replace(horizon=horizon)
    for name in ["pes", "es_single", "gpes"]:
        estimator = build(name, sampled, truncation=4, noise_period=8, num_pairs=8)
        draws = window_gradients(estimator, jax.random.key(3), theta, 200, 4000)
        assert is_unbiased(Samples(draws.mean(axis=1)), truth), name
