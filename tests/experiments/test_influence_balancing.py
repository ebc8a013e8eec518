"""``influence_balancing`` at smoke scale: only PES and ES-Single reach the optimum."""

import dataclasses

import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import influence_balancing
from tests.helpers import present
from tests.stored import expect

pytestmark = pytest.mark.experiments


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(influence_balancing.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(influence_balancing.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    claims = influence_balancing.claims(summary)
    assert len(claims) == 4
    assert all(claim.holds for claim in claims)
    assert "loss at the end" in capsys.readouterr().out
    steps = {present(r.step) for r in results.read(folder)}
    assert len(steps) == 61
    assert max(steps) == 600
    expect(
        "influence_balancing experiment",
        {name: summary.find("theta", estimator=name)["mean"] for name in settings.estimators},
    )


def test_a_run_that_is_not_finite_is_reported(tmp_path):
    settings = dataclasses.replace(
        influence_balancing.SCALES["smoke"],
        out=tmp_path,
        num_steps=200,
        num_pairs=4,
        learning_rate=1e30,
        estimators=("tbptt", "es_single"),
    )
    folder = present(framework.execute(influence_balancing.EXPERIMENT, settings))
    assert max(present(r.step) for r in results.read(folder)) == 200
    claims = {c.says: c for c in influence_balancing.claims(results.read_summary(folder))}
    assert claims["tbptt moves away from it"].holds
    assert not claims["es_single reaches the optimum"].holds
    assert "not finite" in claims["es_single reaches the optimum"].ours
