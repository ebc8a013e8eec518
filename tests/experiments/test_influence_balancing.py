"""``influence_balancing`` at smoke scale: PES and ES-Single arrive, truncated estimators do not."""

import dataclasses

from stored import expect

from experiments import experiment as framework
from experiments import influence_balancing, results


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(influence_balancing.SCALES["smoke"], out=tmp_path)
    folder = framework.execute(influence_balancing.EXPERIMENT, settings)
    summary = results.read_summary(folder)
    claims = influence_balancing.claims(summary)
    assert len(claims) == 4
    assert all(claim.holds for claim in claims)
    assert "loss at the end" in capsys.readouterr().out
    steps = {r.step for r in results.read(folder)}
    assert len(steps) == 61
    assert max(steps) == 600
    expect(
        "influence_balancing experiment",
        {name: summary.find("theta", estimator=name)["mean"] for name in settings.estimators},
    )
