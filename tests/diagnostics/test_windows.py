"""The variances predicted from measured windows equal the closed forms, and the measured ones."""

import functools

import jax
import numpy as np
import pytest

import unrollgrad as ug
from tests.diagnostics.closed_forms import analytic_variance
from unrollgrad.diagnostics import exact_windows, measure_windows
from unrollgrad.diagnostics.jackknife import (
    leave_one_out,
    squared_norm_of_mean,
    standard_error,
)
from unrollgrad.diagnostics.windows import stretch_length
from unrollgrad.problems import theory

DIM, HORIZON, TRUNCATION = 5, 24, 3
N = HORIZON // TRUNCATION


@functools.cache
def example():
    """A quadratic problem with memory, curvature and influence through ``init``."""
    problem, theta, influence = ug.problems.linear_recurrence(
        DIM, HORIZON, gradients="independent", memory=0.8, curvature=0.3, init_influence=0.4
    )
    return problem, theta, influence(theta)


@functools.cache
def measured(sigma):
    problem, theta, _ = example()
    return measure_windows(
        problem,
        theta,
        key=jax.random.key(1),
        truncation=TRUNCATION,
        sigma=sigma,
        num_directions=600,
    )


def close(found, truth, most=0.15):
    """Within four standard errors, which are small."""
    se = standard_error(found)
    assert abs(found[0] - truth) < 4 * se, (found[0], truth, se)
    assert se < most / 2 * abs(truth)


@pytest.mark.parametrize("period", [None, 1, 2, 4])
def test_exact_windows_give_the_closed_forms(period):
    _, _, influence = example()
    expected = theory.episode_variance(
        influence, TRUNCATION, None if period is None else period * TRUNCATION
    )
    assert exact_windows(influence, TRUNCATION).variance(period)[0] == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [None, 0.1])
def test_predicted_variances(sigma):
    """Of all periods, of ``truncated_es`` and of both analytic forms; also from derivatives."""
    _, _, influence = example()
    windows = measured(sigma)
    for period in (None, 1, 2, 4):
        steps = None if period is None else period * TRUNCATION
        close(windows.variance(period), theory.episode_variance(influence, TRUNCATION, steps))
    close(windows.truncated_variance(), theory.truncated_variance(influence, TRUNCATION))
    blocks = influence.reshape(N, TRUNCATION, N, TRUNCATION, DIM).sum(axis=(1, 3)) / TRUNCATION
    for replacement in (False, True):
        close(windows.variance_with_backprop(replacement), analytic_variance(blocks, replacement))


def test_ratios_are_known_better_than_variances():
    """The directions are the same: what is common to two estimators cancels."""
    windows = measured(0.1)
    one, many = windows.variance(None), windows.variance(1)
    assert standard_error(many / one) / (many / one)[0] < 0.3 * standard_error(one) / one[0]


def test_gram_matrix():
    """Its entries are inner products; squares of one estimate are P times too large."""
    _, _, influence = example()
    windows, parts = measured(0.1), influence.reshape(N, TRUNCATION, HORIZON, DIM)
    g = parts.sum(axis=(1, 2)) / HORIZON
    gram = windows.gram()
    exact = g @ g.T
    for i, j in ((0, 0), (1, 3), (7, 2)):
        assert abs(gram[0, i, j] - exact[i, j]) < 4 * standard_error(gram[:, i, j])
    estimate = windows.influence.sum(axis=3)[:, 0, 0]  # of window 0 along u: the estimate is h.u u
    of_one = leave_one_out(DIM * estimate**2)
    assert of_one[0] > exact[0, 0] + 10 * standard_error(of_one)


def test_cosine():
    problem, theta, _ = ug.problems.linear_recurrence(DIM, HORIZON)
    found = measure_windows(
        problem, theta, key=jax.random.key(0), truncation=TRUNCATION, sigma=0.1, num_directions=4
    )
    assert found.cosine()[0] == pytest.approx(1, abs=1e-4)


@functools.cache
def with_data():
    """Every episode has its own slopes; the last state counts, too."""

    def init(key, theta):
        return {"s": 1 + 0.5 * theta, "c": 1 + 0.6 * jax.random.normal(key, theta.shape)}

    def step(key, theta, state, t):
        s = 0.7 * state["s"] + theta
        return {"s": s, "c": state["c"]}, state["c"] @ s + 0.1 * s @ s

    def evaluate(key, theta, state):
        return state["c"] @ state["s"] + theta @ theta

    return ug.UnrolledProblem(init, step, 26, evaluate), jax.numpy.array([0.3, -0.2, 0.5])


def test_predicted_equals_measured():
    """26 windows in 13 or fewer stretches, random episodes, and ``evaluate``."""
    problem, theta = with_data()
    windows = measure_windows(
        problem, theta, key=jax.random.key(2), truncation=1, sigma=0.1, num_directions=500
    )
    assert windows.windows_per_stretch > 1
    assert windows.fresh is not None
    estimators = {
        "es_single": ug.es_single(problem, truncation=1, sigma=0.1),
        "pes": ug.pes(problem, truncation=1, sigma=0.1),
        "truncated_es": ug.truncated_es(problem, truncation=1, sigma=0.1),
    }
    found = ug.diagnostics.compare(
        problem,
        theta,
        estimators,
        reference=ug.bptt(problem),
        num_samples=3000,
        num_chains=0,
        batch_size=3000,
        key=jax.random.key(3),
    )
    slope = windows.slope()
    total = leave_one_out(np.mean(slope**2, axis=1))
    spread = total - leave_one_out(slope[:, 0] * slope[:, 1])
    own = windows.own.sum(axis=2)
    truncated = leave_one_out(np.mean(own**2, axis=1)) - leave_one_out(own[:, 0] * own[:, 1])
    predicted = {
        "es_single": windows.variance(None) + spread,
        "pes": windows.variance(0) + spread,
        "truncated_es": windows.truncated_variance() + truncated,
    }
    for row in found.rows:
        prediction = predicted[row["name"]]
        value, se = row["variance"], row["variance_of_mean_se"][row["num_windows"]]
        error = np.hypot(se, standard_error(prediction))
        assert abs(prediction[0] - value) < 4 * error, row["name"]
        assert error < 0.12 * value, row["name"]


def test_jackknife():
    draws = np.random.default_rng(0).normal(size=(40, 2, 3)) + np.array([1.0, 2.0, 0.0])
    found = squared_norm_of_mean(draws)
    flat = draws.reshape(-1, 3)
    expected = np.sum(flat.mean(axis=0) ** 2) - flat.var(axis=0, ddof=1).sum() / len(flat)
    assert found[0] == pytest.approx(expected)
    assert found[1] == pytest.approx(squared_norm_of_mean(draws[1:])[0])
    x = draws[:, 0, 0]
    assert standard_error(leave_one_out(x)) == pytest.approx(x.std(ddof=1) / np.sqrt(len(x)))
    assert standard_error(np.array([3.0])) == 0


def test_stretches():
    assert [stretch_length(n, 12) for n in (1, 12, 26, 32, 100, 13)] == [1, 1, 3, 4, 10, 2]
