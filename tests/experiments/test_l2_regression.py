"""``l2_regression`` at smoke scale, and the closed form of its optimum."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import l2_regression
from experiments.problems import ridge
from tests.helpers import present
from tests.stored import expect


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(l2_regression.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(l2_regression.EXPERIMENT, settings))
    summary, records = results.read_summary(folder), results.read(folder)
    claims = l2_regression.claims(summary)
    assert [claim.holds for claim in claims] == [True, True]
    assert "the optimum is 4.2" in capsys.readouterr().out
    points = l2_regression.POINTS + 1
    assert len(records) == len(settings.starts) * len(settings.estimators) * points * 5
    expect(
        "l2_regression experiment",
        {
            name: summary.find("theta", estimator=name, start="5")["mean"]
            for name in settings.estimators
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


def test_every_estimator_needs_a_rate(tmp_path):
    settings = dataclasses.replace(
        l2_regression.SCALES["smoke"], out=tmp_path, learning_rates=(1.0,)
    )
    with pytest.raises(ValueError, match=r"learning_rates.*for each"):
        framework.execute(l2_regression.EXPERIMENT, settings)
