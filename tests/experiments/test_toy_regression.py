"""``toy_regression`` at smoke scale: ES-Single descends, truncated estimators are stuck."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import toy_regression
from tests.helpers import present
from tests.stored import expect

pytestmark = pytest.mark.experiments


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(toy_regression.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(toy_regression.EXPERIMENT, settings))
    summary, records = results.read_summary(folder), results.read(folder)
    claims = toy_regression.claims(summary)
    assert [claim.holds for claim in claims] == [None, None]  # one seed cannot decide
    ends = [summary.find("loss", estimator=name)["mean"] for name in settings.estimators]
    assert ends[0] > toy_regression.BASIN > ends[1]
    assert "summed loss at the end" in capsys.readouterr().out
    points = toy_regression.POINTS + 1
    assert len(records) == settings.cells**2 + len(settings.estimators) * points * 4
    expect(
        "toy_regression experiment",
        {
            "tbptt": summary.find("loss", estimator="tbptt")["mean"],
            "surface": sum(r.value for r in records if r.metric == "surface"),
        },
    )


def test_the_surface_has_theta0_along_its_rows():
    losses = toy_regression.surface(6)  # -5, -3, -1, 1, 3, 5
    loss = jax.jit(toy_regression.summed_loss)
    assert losses[1, 4] == pytest.approx(float(loss(jnp.array([3.0, -3.0]))), rel=1e-3)
    assert losses[4, 1] == pytest.approx(float(loss(jnp.array([-3.0, 3.0]))), rel=1e-3)
    assert losses[4, 1] > 2 * losses[1, 4]  # falling rates help, growing ones do not


def test_the_papers_minimum_is_in_the_basin():
    loss = jax.jit(toy_regression.summed_loss)
    assert float(loss(jnp.array([-4.0, -4.0]))) == pytest.approx(2488, rel=1e-3)
    assert float(loss(jnp.array([2.80, -4.1]))) < toy_regression.BASIN
