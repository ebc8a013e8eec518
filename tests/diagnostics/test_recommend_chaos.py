"""Chaos as a dial: the logistic map at several rates and horizons, in plain numpy.

Backpropagation has the least error up to some horizon and evolution strategies after it. The truth
comes from many episodes; the recommendation has what ``diagnose`` would measure.
"""

import functools

import numpy as np
import pytest

from unrollgrad.diagnostics import Measurements, StepCost, Windows, recommend
from unrollgrad.diagnostics.measurements import derivatives_of

SIGMA, WORKERS, BACK = 0.01, 64, 3.0
MOST, MANY = 200, 20_000
BY_DERIVATIVES = ("bptt", "forward_mode", "dodge", "tbptt", "pes_analytic_replacement")
CHAOTIC = {3.6: 0.18, 3.7: 0.35, 3.8: 0.43, 3.9: 0.495, 3.95: 0.58}
"""Rates of the map that are chaotic, and about their exponents."""


def runs(rate, start, num_steps=MOST):
    """The mean of s over the first T steps, and its derivative, for every T: (T, episodes)."""
    s, slope = start, np.zeros_like(start)
    values, slopes = [], []
    for _ in range(num_steps):
        slope = s * (1 - s) + rate * (1 - 2 * s) * slope
        s = rate * s * (1 - s)
        values.append(s)
        slopes.append(slope)
    steps = np.arange(1, num_steps + 1)[:, None]
    return np.cumsum(values, axis=0) / steps, np.cumsum(slopes, axis=0) / steps


@functools.cache
def episodes(rate, number, seed):
    """Derivatives, and half differences over sigma, of so many episodes: (T, episodes) each."""
    start = np.random.default_rng(seed).uniform(0.1, 0.9, size=number)
    plus, minus = (runs(rate + sign * SIGMA, start)[0] for sign in (1, -1))
    return runs(rate, start)[1], (plus - minus) / (2 * SIGMA)


@functools.cache
def errors(rate):
    """The mean squared errors of ``bptt`` and of ``es_single`` at the budget, for every T."""
    derivative, slope = episodes(rate, MANY, 0)
    smoothed = slope.mean(axis=1)
    bias = (derivative.mean(axis=1) - smoothed) ** 2 - derivative.var(axis=1) / MANY
    es = 3 * np.mean(slope**2, axis=1) - smoothed**2
    budget = 2 * WORKERS
    return np.maximum(bias, 0) + derivative.var(axis=1) * BACK / budget, es * 2 / budget


def recommended(rate, horizon, seed):
    """What is recommended after 32 episodes: the name of the first."""
    derivative, slope = (x[horizon - 1].reshape(16, 2) for x in episodes(rate, 32, seed))
    windows = Windows(slope[..., None, None], slope[..., None], None, 1, 1)
    both = np.stack([derivative, derivative])
    gradients = derivative[..., None]
    derivatives = derivatives_of(gradients, gradients, both, windows)
    cost = StepCost(1.0, BACK, BACK)
    return recommend(Measurements(horizon, horizon, WORKERS, windows, derivatives, cost))[0].name


def switch(use_derivatives):
    """The first horizon from which on most of ten neighbours do not use derivatives."""
    away = ~np.asarray(use_derivatives)
    smooth = np.convolve(away, np.ones(9) / 9, mode="same")
    return int(np.argmax(smooth > 0.5)) + 1


@pytest.mark.parametrize("rate", list(CHAOTIC))
def test_the_switch_is_where_the_errors_cross(rate):
    back, es = errors(rate)
    crossing = switch(back < es)
    found = []
    for seed in range(1, 8):
        names = [recommended(rate, horizon, seed) for horizon in range(1, MOST + 1)]
        found.append(switch([name in BY_DERIVATIVES for name in names]))
    assert 5 < crossing < MOST / 2
    assert np.median(found) == pytest.approx(crossing, rel=0.2, abs=2), (found, crossing)
    assert recommended(rate, MOST, 1) in ("es_single", "full_es")


def test_regret():
    """Over all rates and horizons; the first is compared with both."""
    found = []
    for rate in CHAOTIC:
        back, es = errors(rate)
        for seed in (11, 12, 13):
            for horizon in (1, 2, 3, 5, 8, 12, 18, 25, 35, 50, 75, 100, 150, 200):
                by = recommended(rate, horizon, seed) in BY_DERIVATIVES
                both = back[horizon - 1], es[horizon - 1]
                found.append(both[0 if by else 1] / min(both))
    assert np.median(found) <= 1.05
    assert np.quantile(found, 0.9) <= 1.5


@pytest.mark.parametrize("rate", [3.2, 3.5])
def test_stable_cycles_are_differentiated(rate):
    for horizon in (10, 50, 200):
        assert all(recommended(rate, horizon, seed) in BY_DERIVATIVES for seed in range(5))
