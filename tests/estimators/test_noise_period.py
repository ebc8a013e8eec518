"""How often to draw the noise: pes, gpes and es_single against each other, by the closed form.

The statements are those of ``ug.problems.theory``. Samples of each estimator are drawn by one
program, whose arguments are the gradients of the steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from tests.statistics import Samples, sampler
from unrollgrad.problems import theory

DIM, HORIZON, PERIODS = 8, 30, 5
PERIOD = {"pes": 1, "gpes": HORIZON // PERIODS, "es_single": None}


def alone(gradients):
    """The influence of steps whose theta matters for their own loss alone: (T, T, P)."""
    steps = np.arange(len(gradients))
    influence = np.zeros((len(gradients), *gradients.shape))
    influence[steps, steps] = gradients
    return influence


def falling():
    """Gradients that agree in direction and fall by a tenth in every step."""
    return 0.9 ** np.arange(HORIZON)[:, None] * np.ones(DIM)


def varying(ratio, horizon=HORIZON, dim=DIM, seed=0):
    """Gradients around a mean; it is ``ratio`` times the standard error of their mean."""
    noise = np.random.default_rng(seed).normal(size=(horizon, dim))
    noise -= noise.mean(axis=0)
    noise /= np.sqrt(np.mean(np.sum(noise**2, axis=1)))
    return noise + ratio / np.sqrt(horizon * dim)


def random_influence(horizon, dim, seed):
    draws = np.random.default_rng(seed)
    mean, memory = draws.normal(size=dim), draws.uniform(-1, 1)
    lags = np.arange(horizon)[:, None] - np.arange(horizon)
    kernel = np.where(lags >= 0, memory ** np.maximum(lags, 0), 0.0)
    return kernel[..., None] * (mean + draws.normal(size=(horizon, horizon, dim)))


def ratio(influence, period):
    """The variance of gpes over es_single's."""
    return theory.episode_variance(influence, 1, period) / theory.episode_variance(influence, 1)


@functools.cache
def program(name):
    def make(gradients):
        def step(key, theta, state, t):
            return state, gradients[t] @ theta

        problem = ug.UnrolledProblem(lambda key, theta: jnp.zeros(()), step, HORIZON)
        settings = {"truncation": 1, "sigma": 1.0, "noise_period": PERIOD["gpes"]}
        return ug.REGISTRY[name].build(problem, **settings)

    return sampler(make, HORIZON)


@functools.cache
def measured(name, structure):
    """The variance of the mean over an episode, and its standard error."""
    gradients = {"falling": falling(), "varying": varying(4.0)}[structure]
    draw = program(name)
    data = gradients.astype(np.float32)
    grads = draw(jax.random.key(3), 8000, np.zeros(DIM, np.float32), data)
    exact = theory.episode_variance(alone(gradients), 1, PERIOD[name])
    return *Samples(grads.mean(axis=1)).variance(), exact


@pytest.mark.parametrize("structure", ["falling", "varying"])
@pytest.mark.parametrize("name", PERIOD)
def test_samples_have_the_variance_of_the_closed_form(name, structure):
    value, se, exact = measured(name, structure)
    assert se < 0.04 * exact
    assert abs(value - exact) < 5 * se


def test_pes_may_have_much_less_than_half_of_es_singles_variance():
    """With gradients that agree and fall, 0.272 for P = 8 and n = 30."""
    exact = ratio(alone(falling()), 1)
    assert exact == pytest.approx(0.272, abs=5e-4)
    (pes, pes_se, _), (single, single_se, _) = (
        measured("pes", "falling"),
        measured("es_single", "falling"),
    )
    se = pes / single * np.hypot(pes_se / pes, single_se / single)
    assert abs(pes / single - exact) < 4 * se
    assert pes / single + 5 * se < 0.5


def test_an_intermediate_period_may_have_less_variance_than_both():
    """Gradients whose mean is four times its standard error: five periods beat thirty and one."""
    gpes, others = (
        measured("gpes", "varying"),
        [measured(n, "varying") for n in ("pes", "es_single")],
    )
    for value, se, _ in others:
        assert value - gpes[0] > 5 * np.hypot(se, gpes[1])
    best = theory.best_noise_period(alone(varying(4.0)), 1)
    assert best is not None
    assert 3 <= HORIZON // best <= 6


def double_sum(h):
    """pes's variance by Wick's contraction window by window; h[k, j] is j's influence on loss k."""
    n, dim, total = len(h), h.shape[-1], 0.0
    for k in range(n):
        for s in range(n):
            m = min(k, s) + 1
            total += dim * m * np.sum(h[k, :m] * h[s, :m])
            total += h[s, :m].sum(axis=0) @ h[k, :m].sum(axis=0)
    return total / n**2


def test_only_the_periods_matter():
    """gpes with m periods has the variance of pes with m windows, however short its windows are."""
    for seed in range(5):
        influence = random_influence(12, 3, seed)
        found = [theory.episode_variance(influence, k, 4) for k in (1, 2, 4)]
        np.testing.assert_allclose(found, found[0], rtol=1e-10)
        blocks = influence.reshape(3, 4, 3, 4, -1).sum(axis=(1, 3)) / 4
        np.testing.assert_allclose(found[0], double_sum(blocks), rtol=1e-10)
        assert abs(theory.episode_variance(influence, 1, 2) / found[0] - 1) > 1e-3  # more periods


def test_without_influence_across_periods():
    shares = np.random.default_rng(1).normal(size=(7, 3))
    j = np.arange(1, 8)
    exact = np.sum((3 * j + 1) * np.sum(shares**2, axis=1))
    found = theory.episode_variance(alone(7 * shares), 1, 1)
    np.testing.assert_allclose(found, exact, rtol=1e-10)


@pytest.mark.parametrize(("n", "dim"), [(2, 1), (10, 1), (30, 8), (10, 50)])
def test_the_least_ratio_is_a_sharp_bound(n, dim):
    least = theory.least_ratio(n, dim)
    own = 1 / (1 + np.arange(n) * (1 - 1 / dim))
    later = np.diag(own) - np.tril(np.tile(own[:, None], n), -1) / dim  # c[i, j] for i >= j
    influence = later - np.vstack([later[1:], np.zeros(n)])
    influence = np.tril(influence)[..., None] * np.eye(dim)[0]
    assert ratio(influence, 1) == pytest.approx(least, rel=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(20):  # and nothing near it is lower
        nudge = np.tril(rng.normal(size=(n, n)))[..., None] * rng.normal(size=dim)
        assert ratio(influence + 1e-3 * nudge, 1) > least * (1 - 1e-12)
    for seed in range(20):
        assert ratio(random_influence(n, dim, seed), 1) > least


def test_there_is_no_largest_ratio():
    """Gradients that cancel up to a share: the ratio grows like its inverse square."""
    signs = np.where(np.arange(HORIZON) % 2, 1.0, -1.0)[:, None]
    small, smaller = (ratio(alone((signs + rest) * np.ones(DIM)), 1) for rest in (0.1, 0.01))
    assert small > HORIZON
    assert smaller > 50 * small


@pytest.mark.parametrize("snr", [1, 2, 4, 8, 16, 64])
def test_the_best_number_of_periods_is_the_signal_to_noise_ratio(snr):
    """For gradients that vary independently around a mean, on average over draws."""
    n, dim = 64, 16
    counts = [1, 2, 4, 8, 16, 32, 64]
    found = np.zeros(len(counts))
    for seed in range(30):
        influence = alone(varying(snr, n, dim, seed))
        found += [ratio(influence, n // m) / 30 for m in counts]
    assert counts[int(np.argmin(found))] == min(snr, n)
    if snr < 2:
        return
    square = 1.0  # |g|^2, the noise's own mean being zero
    for m, value in zip(counts[1:], found[1:], strict=True):
        expected = (dim * (m + 1) / 2 + 1) * (1 / m + 1 / snr**2) * square / (dim + 1)
        assert value == pytest.approx(expected, rel=0.2)
