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
    assert {claim.holds for claim in claims} == {None}  # one seed cannot decide
    ends = [summary.find("loss", estimator=name)["mean"] for name in settings.estimators]
    assert max(ends[:2]) < 1e-2 * 8 < 8 < min(ends[2:])
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
    assert {claim.holds for claim in claims.values()} == {None}
    assert all("diverged (not finite" in claim.ours for claim in claims.values())
