"""``long_run_variance`` at smoke scale, and the closed form of staggered workers."""

import dataclasses

import jax
import numpy as np
import pytest

import unrollgrad as ug
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import long_run_variance
from experiments.estimators.staggered_variance import staggered_variance
from tests.helpers import present
from tests.stored import expect
from unrollgrad.problems import theory


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(long_run_variance.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(long_run_variance.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    claims = {claim.says: claim.holds for claim in long_run_variance.claims(summary)}
    assert len(claims) == 1 + 1 + 1
    assert set(claims.values()) == {True}
    assert len(results.read(folder)) == (2 + 3 + 3) * 3
    assert "per episode-pair" in capsys.readouterr().out
    numbers = {
        f"{name} {updates}": summary.find("exact", estimator=name, updates=updates)["mean"]
        for name in ("nres", "pes")
        for updates in long_run_variance.UPDATES
    }
    expect("long_run_variance experiment", numbers)


@pytest.mark.parametrize(
    ("period", "updates", "known"),
    [(None, 1, 2.1), (None, 10, 14), (None, 200, 20), (1, 1, 11), (1, 10, 11), (1, 200, 11)],
)
def test_staggered_workers_of_monte_carlo(period, updates, known):
    """It equals an independent simulation: n = 10, P = 20, equal gradients in all windows."""
    example = ug.problems.linear_recurrence(20, 10)
    influence = example.influence(example.theta)
    square = np.sum(theory.gradient(influence) ** 2)
    found = staggered_variance(influence, 1, period, updates) / square
    assert found == pytest.approx(known, rel=0.05)


@pytest.mark.parametrize("period", [None, 4, 2])
def test_one_update_of_staggered_workers_is_a_window_without_its_own_gradient(period):
    example = ug.problems.linear_recurrence(3, 8, gradients="independent", memory=0.6)
    influence = example.influence(example.theta)
    each = influence.sum(axis=1).reshape(4, 2, 3).mean(axis=1)
    cycle = np.mean(np.sum((each - theory.gradient(influence)) ** 2, axis=1))
    expected = (theory.window_variance(influence, 2, period) - cycle) / 4
    assert staggered_variance(influence, 2, period, 1) == pytest.approx(expected)


def test_conflicting_gradients():
    settings = dataclasses.replace(long_run_variance.SCALES["smoke"], num_windows=6, truncation=2)
    _, _, aligned = long_run_variance.recurrence(settings, "aligned")
    problem, theta, influence = long_run_variance.recurrence(settings, "conflicting")
    ratio = theory.gradient(influence) / theory.gradient(aligned)
    np.testing.assert_allclose(ratio, long_run_variance.REST)
    estimator = ug.bptt(problem)
    key = jax.random.key(0)
    grad = estimator.estimate(key, theta, estimator.init(key, theta))[0].grad
    np.testing.assert_allclose(grad, theory.gradient(influence), rtol=1e-5)
