"""``lorenz`` at smoke scale: NRES finds the constants of a short, tame trajectory."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from stored import expect

import unrollgrad as ug
from experiments import experiment as framework
from experiments import lorenz, results


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(lorenz.SCALES["smoke"], out=tmp_path)
    folder = framework.execute(lorenz.EXPERIMENT, settings)
    summary, records = results.read_summary(folder), results.read(folder)
    claims = {claim.says: claim.holds for claim in lorenz.claims(summary)}
    assert claims["nres recovers (a, r) within 2%"]
    assert "error of a, r" in capsys.readouterr().out
    points = lorenz.POINTS + 1
    assert len(records) == len(settings.estimators) * (points * 6 + 2)
    expect("lorenz experiment", {"r": summary.find("r", estimator="nres")["mean"]})


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
