"""``control`` at smoke scale: all methods learn, truncated ES less than the others."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from stored import expect

import unrollgrad as ug
from experiments import control, results, tuning
from experiments import experiment as framework


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(control.SCALES["smoke"], out=tmp_path)
    folder = framework.execute(control.EXPERIMENT, settings)
    summary = results.read_summary(folder)
    claims = control.claims(summary)
    assert len(claims) == 8
    assert all(claim.holds is None for claim in claims)  # one seed
    assert [claim.ours == "not run" for claim in claims].count(True) == 6
    assert "steps to full ES's J" in capsys.readouterr().out
    records = results.read(folder)
    for name in ("full_es", "es_single"):
        assert summary.find("inner_steps", estimator=name)["mean"] == settings.budget
    first = {r.value for r in records if r.metric == "loss" and r.step == 0}
    assert len(first) == 1
    after = {
        name: summary.find("loss", estimator=name)["mean"]
        for name in ("full_es", "truncated_es", "es_single")
    }
    assert all(loss < 0.2 * min(first) for loss in after.values())
    expect("control experiment", {"before": first.pop(), "full_es": after["full_es"]})


def test_one_update_of_few_pairs_costs_what_a_window_does():
    settings = control.SCALES["cpu"]
    problem, _ = ug.problems.control(settings.horizon)
    costs = {name: cost for name, (_, cost) in control.estimators(settings, problem).items()}
    assert costs == {
        "full_es": 2000,
        "full_es_few": 200,
        "truncated_es": 210,
        "pes": 200,
        "es_single": 200,
        "nres": 200,
    }


def test_steps_to():
    curve = [(0, 3.0), (10, 1.0), (20, 2.0), (30, 0.5)]
    assert control.steps_to(1.0, curve) == 10
    assert control.steps_to(0.6, curve) == 30
    assert control.steps_to(0.1, curve) == math.inf


def test_claims_can_fail():
    def found(metric, steps):
        return [
            {"estimator": n, "metric": metric, "mean": m, "se": 1.0, "n": 3}
            for n, m in steps.items()
        ]

    steps = {"full_es": 10.0, "full_es_few": 5.0, "pes": 7.0, "es_single": 9.0, "nres": None}
    summary = results.Summary(found("steps", steps), {})
    holds = {claim.says: claim.holds for claim in control.claims(summary)}
    assert holds["pes reaches full ES's J in fewer environment steps than full_es"] is True
    assert holds["es_single reaches full ES's J in fewer environment steps than full_es"] is False
    assert holds["nres reaches full ES's J in fewer environment steps than full_es"] is False


@pytest.mark.parametrize(("rates", "best"), [((0.1, 1.0, 3.0), 1.0), ((0.1, 1e30), 0.1)])
def test_best_rate_of_a_parabola(rates, best):
    """Gradient descent on x^2 / 2 is there after one step of 1 and diverges with 3."""
    problem = ug.UnrolledProblem(
        init=lambda key, x: x, step=lambda key, x, state, t: (state, x**2 / 2), horizon=1
    )
    found = tuning.best_rate(
        ug.bptt(problem),
        optax.sgd,
        rates,
        jax.random.split(jax.random.key(0), 2),
        jnp.float32(1),
        num_updates=4,
        every=2,
        loss=lambda x: x**2 / 2 + 1e-3,
    )
    assert found == best
