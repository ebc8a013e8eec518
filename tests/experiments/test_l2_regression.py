"""``l2_regression`` at smoke scale, and the closed form of its optimum."""

import dataclasses
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import l2_regression
from experiments.problems import ridge
from tests.helpers import present, raises
from tests.stored import expect


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(l2_regression.SCALES["smoke"], out=tmp_path, seeds=(0, 1))
    folder = present(framework.execute(l2_regression.EXPERIMENT, settings))
    summary, records = results.read_summary(folder), results.read(folder)
    claims = l2_regression.claims(summary)
    assert [claim.holds for claim in claims] == [True, True]
    assert "the optimum is 4.2" in capsys.readouterr().out
    points = l2_regression.POINTS + 1
    series = len(settings.seeds) * len(settings.starts) * len(settings.estimators)
    assert len(records) == series * points * 5
    expect(
        "l2_regression experiment",
        {
            r.labels["estimator"]: r.value
            for r in records
            if (r.seed, r.step, r.metric) == (0, settings.num_steps, "theta")
            and r.labels["start"] == "5"
        },
    )


@pytest.mark.experiments
def test_gradient_descent_ends_at_the_ridge_solution():
    data, theta = ridge.diabetes(), jnp.float32(4.0)
    problem = ridge.ridge(data, 1000)
    key = jax.random.key(0)

    def step(w, t):
        return problem.step(key, theta, w, t)

    _, losses = jax.jit(lambda w: jax.lax.scan(step, w, jnp.arange(1000)))(problem.init(key, theta))
    assert losses[0] > 2 * losses[-1]
    assert losses[-1] == pytest.approx(float(ridge.converged_loss(data, theta)), rel=1e-4)


@pytest.mark.experiments
def test_the_best_l2_is_the_only_place_where_the_loss_is_flat():
    data = ridge.diabetes()
    slopes = jax.vmap(jax.grad(lambda theta: ridge.converged_loss(data, theta)))
    at = np.arange(-5, 8, 0.25)
    rises = np.asarray(slopes(jnp.asarray(at, jnp.float32))) > 0
    assert list(rises) == list(at > ridge.best_log_l2(data))


def test_the_split_is_standardised_by_the_training_data_alone():
    data = ridge.diabetes()
    assert data.x.shape == (353, 10)
    assert data.x_validation.shape == (89, 10)
    np.testing.assert_allclose(np.mean(data.x, axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(data.y), 1, rtol=1e-5)
    assert np.abs(np.mean(data.x_validation, axis=0)).max() > 0.01


def end(distance, start="5", se=0.01, n=5):
    """The results of an estimator from one start."""
    here = {"start": start, "estimator": "pes", "se": se, "n": n}
    numbers = {"theta": 1.33 + distance, "distance": distance, "best": 1.33}
    return [{**here, "metric": name, "mean": value} for name, value in numbers.items()]


@pytest.mark.parametrize(
    ("ends", "holds"),
    [
        (end(0.01) + end(0.1, "-5"), True),
        (end(0.01) + end(9.0, "-5"), False),
        (end(0.01) + end(1.8, "-5", se=1.8), None),  # one of five seeds ended elsewhere
        (end(0.01, se=None, n=1), None),
        (end(math.nan, se=math.nan), None),
    ],
)
def test_claims_can_fail(ends, holds):
    about = {"config": {"estimators": ["pes", "es_single"]}}
    (claim,) = l2_regression.claims(results.Summary(ends, about))
    assert claim.holds is holds


def test_the_yacht_data_have_the_papers_optimum():
    """On rows of other numbers the split is tested; on the real file, if it is given, theta."""
    path = Path(os.environ.get("YACHT", "not given"))
    if not path.is_file():
        pytest.skip("set YACHT to the path of yacht_hydrodynamics.data")
    assert ridge.best_log_l2(ridge.yacht(path)) == pytest.approx(1.333, abs=2e-3)


def test_the_yacht_split(tmp_path):
    """All rows are standardised together, and the permutation of the papers is numpy's with 1."""
    table, path = np.random.default_rng(0).normal(3, 2, ridge.YACHT), tmp_path / "yacht.data"
    np.savetxt(path, table)
    data = ridge.yacht(path)
    assert data.x.shape == (246, 6)
    assert data.y_validation.shape == (62,)
    np.random.seed(1)  # noqa: NPY002
    order = np.random.choice(range(308), 308, replace=False)  # noqa: NPY002, as the papers' code
    expected = ((table - table.mean(axis=0)) / table.std(axis=0))[order]
    np.testing.assert_allclose(data.y, expected[:246, -1], rtol=1e-5)
    np.testing.assert_allclose(data.x_validation, expected[246:, :-1], rtol=1e-5)


def test_a_file_that_is_not_the_yacht_data(tmp_path):
    path = tmp_path / "other.data"
    for text, says in [("1 2 3\n4 5 6\n", "shape (2, 3)"), ("a,b\n", "not a table of numbers")]:
        path.write_text(text)
        with raises(ValueError, "`data`", str(path), says, "yacht_hydrodynamics.data"):
            ridge.yacht(path)


def test_every_estimator_needs_a_rate(tmp_path):
    settings = dataclasses.replace(
        l2_regression.SCALES["smoke"], out=tmp_path, learning_rates=(1.0,)
    )
    with pytest.raises(ValueError, match=r"learning_rates.*for each"):
        framework.execute(l2_regression.EXPERIMENT, settings)
