"""Why no estimator chooses its own noise period: a fair rule for it does not beat both ends.

The rule, in closed form and without JAX: 32 workers share, for every period, an average of their
squared episode gradients, whose mean is the variance plus |g|^2. It is unbiased, since the choice
for an episode depends on earlier episodes alone. An eighth of the workers try the other periods
and are left out of the mean, because a single episode of ``pes`` may have 25 times the variance.
Statistics that a worker does not share are 32 times as slow.
"""

import functools

import numpy as np
import pytest

from unrollgrad.problems import theory

DIM, N, WORKERS, EXPLORERS, EPISODES = 20, 32, 32, 4, 120
PERIODS = (1, N // 4, N)  # of pes, of gpes, of es_single


def slopes(kind, draws):
    """The windows' gradients, without influence across windows."""
    if kind == "conflict":
        return draws.normal(size=(N, DIM))
    share = np.ones(N) if kind == "agree" else 1 / np.arange(1, N + 1)
    return share[:, None] * draws.normal(size=DIM)


def drawn(own, period, number, draws):
    """Episode gradients of ``gpes``: the noise so far times what the period's noise changes."""
    parts = np.add.reduceat(own, np.arange(0, N, period)) / N
    noise = draws.normal(size=(number, *parts.shape))
    changes = np.einsum("jp,ejp->ej", parts, noise)
    return np.einsum("ej,ejp->ep", changes, np.cumsum(noise, axis=1))


def variances(own, g):
    """Over |g|^2, of the two ends: ``theory.episode_variance`` without influence across windows."""
    noise_so_far = DIM * np.arange(1, N + 1) + 1
    return noise_so_far @ np.sum((own / N) ** 2, axis=1) / (g @ g), DIM + 1


@functools.cache
def mean_error(begin, end, seed):
    """Mean squared error of a worker over |g|^2, by the rule and by pes and es_single.

    The windows' gradients go from ``begin`` to ``end`` during the training, if they differ.
    """
    draws = np.random.default_rng(seed)
    first = slopes(begin, draws)
    last = first if begin == end else slopes(end, draws)
    squares, found = np.full(len(PERIODS), np.inf), []
    for e in range(EPISODES):
        own = first + (last - first) * e / EPISODES
        g = own.mean(axis=0)
        best = int(np.argmin(squares)) if e else 2
        others = [a for a in range(len(PERIODS)) if a != best]
        used = drawn(own, PERIODS[best], WORKERS - EXPLORERS, draws)
        error = np.sum((used.mean(axis=0) - g) ** 2) * WORKERS
        found.append([error / (g @ g), *variances(own, g)])
        tried = {a: drawn(own, PERIODS[a], EXPLORERS // 2, draws) for a in others}
        for a, x in (tried | {best: used}).items():
            seen, rate = np.mean(np.sum(x**2, axis=1)), 0.5 if a == best else 0.3
            squares[a] = seen if np.isinf(squares[a]) else squares[a] + rate * (seen - squares[a])
    return np.mean(found, axis=0)


def over_seeds(begin, end):
    return np.mean([mean_error(begin, end, s) for s in range(6)], axis=0)


@pytest.mark.parametrize("period", PERIODS)
def test_the_simulated_variances_are_the_closed_ones(period):
    draws = np.random.default_rng(0)
    own = slopes("fall", draws)
    x = drawn(own, period, 20_000, draws)
    squared = np.sum((x - own.mean(axis=0)) ** 2, axis=1)
    truth = theory.episode_variance(np.eye(N)[..., None] * own[:, None], 1, period)
    if period != N // 4:
        g = own.mean(axis=0)
        assert truth == pytest.approx((g @ g) * variances(own, g)[PERIODS.index(period) // 2])
    assert abs(squared.mean() - truth) < 4 * squared.std() / np.sqrt(len(squared))


@pytest.mark.parametrize("kind", ["agree", "fall", "conflict"])
def test_where_nothing_changes_it_finds_the_better_end_and_pays_for_it(kind):
    rule, *ends = over_seeds(kind, kind)
    assert 1.05 < rule / min(ends) < 1.5
    assert rule < 0.8 * max(ends)


@pytest.mark.parametrize("begin", ["agree", "fall"])
def test_where_agreement_is_lost_it_does_not_clearly_beat_es_single(begin):
    rule, pes, one = over_seeds(begin, "conflict")
    assert 0.85 < rule / one < 1.3
    assert rule < 0.6 * pes
