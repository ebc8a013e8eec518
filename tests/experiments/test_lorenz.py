"""``lorenz`` at smoke scale: NRES finds the constants of a short, regular trajectory."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import unrollgrad as ug
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments._framework.results import Summary
from experiments.estimators import lorenz
from tests.helpers import present
from tests.stored import expect


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(lorenz.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(lorenz.EXPERIMENT, settings))
    summary, records = results.read_summary(folder), results.read(folder)
    claims = {claim.says: claim.holds for claim in lorenz.claims(summary)}
    assert claims["nres recovers (a, r) within 2%"]
    assert "error of a, r" in capsys.readouterr().out
    points = lorenz.POINTS + 1
    assert len(records) == len(settings.estimators) * (points * 6 + 2)
    expect("lorenz experiment", {"r": summary.find("r", estimator="nres")["mean"]})


@pytest.mark.experiments
def test_nothing_is_lost_at_the_truth_from_any_start():
    problem, theta = ug.problems.lorenz(200)
    truth = jnp.log(jnp.array(lorenz.TRUTH, jnp.float32))
    key = jax.random.key(1)
    loss = jax.jit(lambda theta: ug.episode_loss(lorenz.perturbed(problem), key, theta))
    assert float(loss(truth)) == pytest.approx(0, abs=1e-6)
    assert float(loss(theta)) > 100
    numbers = lorenz.evaluate(problem, 2, truth + jnp.log(jnp.array([1.1, 0.97])))
    assert float(numbers["error"]) == pytest.approx(0.1, rel=1e-4)
    assert float(numbers["a"]) == pytest.approx(11, rel=1e-4)


def recovered(seeds, **means):
    """A summary with the methods' steps and an error of 1; None means not with every seed."""
    found = [
        {"metric": metric, "estimator": name, "mean": mean, "se": 1.0}
        for name, mean in means.items()
        for metric in lorenz.WORK
    ]
    return Summary(found, {"seeds": seeds, "config": {"horizon": 100}})


@pytest.mark.parametrize(
    ("seeds", "nres", "pes", "holds"),
    [
        ([0, 1], 10.0, 20.0, True),
        ([0, 1], 10.0, 12.0, False),  # within two standard errors
        ([0, 1], 10.0, None, True),
        ([0, 1], None, 20.0, False),
        ([0, 1], None, None, None),
        ([0], 10.0, 20.0, None),
    ],
)
def test_who_recovers_sooner(seeds, nres, pes, holds):
    claims = lorenz.claims(recovered(seeds, nres=nres, pes=pes))
    assert [claim.holds for claim in claims] == [holds, holds]
    assert all("than pes" in claim.says for claim in claims)


def test_every_estimator_needs_a_rate(tmp_path):
    settings = dataclasses.replace(lorenz.SCALES["smoke"], out=tmp_path, learning_rates=(1.0,))
    with pytest.raises(ValueError, match=r"learning_rates.*for each"):
        framework.execute(lorenz.EXPERIMENT, settings)
