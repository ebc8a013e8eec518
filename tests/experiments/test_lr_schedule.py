"""``lr_schedule`` at smoke scale: the grid, the runs, and a loss without a gradient."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import heat_map, results
from experiments.estimators import lr_schedule
from experiments.problems import image_mlp
from tests.helpers import present
from tests.stored import expect


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(lr_schedule.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(lr_schedule.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    near, unmoved = lr_schedule.claims(summary)
    assert near.says == "accuracy: es_single ends within 5% of the grid's minimum"
    assert near.holds is None
    assert unmoved.holds
    records = results.read(folder)
    cells = [r.value for r in records if r.metric == "J" and r.labels["estimator"] == "grid"]
    assert len(cells) == 6
    assert -1 <= heat_map.minimum(summary, objective="accuracy") <= 0
    steps = {r.step for r in records if r.labels["estimator"] == "es_single"}
    assert steps == set(range(13))
    assert "J at the end" in capsys.readouterr().out
    es = summary.find("log_theta0", objective="accuracy", estimator="es_single")["mean"]
    expect("lr_schedule experiment", {"minimum": min(cells), "es_single log_theta0": es})


def result(estimator, metric, mean, se):
    n = 1 if se is None else 3
    return {
        "objective": "loss",
        "estimator": estimator,
        "metric": metric,
        "mean": mean,
        "se": se,
        "n": n,
    }


@pytest.mark.parametrize(
    ("good", "bad", "comes_out"),
    [(0.51, 0.9, True), (0.53, 0.6, False), (math.nan, math.nan, None)],
)
def test_claims_can_fail(good, bad, comes_out):
    found = [result("grid", "minimum", 0.5, None)]
    found += [result(name, "J", good, 0.001) for name in ("pes", "es_single")]
    found += [result(name, "J", bad, 0.001) for name in ("truncated_es", "tbptt")]
    claims = lr_schedule.claims(results.Summary(found, {}))
    assert [claim.holds for claim in claims] == [comes_out] * 4


@pytest.mark.experiments
def test_the_schedule():
    """The rate is theta0 / (1 + t / c)^theta1."""
    gradient = jnp.float32(1)
    for theta0, theta1, t in [(0.1, 2.0, 0), (0.1, 2.0, 50), (0.5, 30.0, 10)]:
        optimizer = image_mlp.decaying_sgd(jnp.log(jnp.array([theta0, theta1])), t, 100.0)
        update, _ = optimizer.update(gradient, optimizer.init(gradient))
        np.testing.assert_allclose(-update, theta0 / (1 + t / 100) ** theta1, rtol=1e-5)


@pytest.mark.experiments
def test_the_network():
    """Zero weights give a guess with the entropy ln 10; two ReLUs equal their formula."""
    batch = jnp.ones((4, 3)), jnp.array([0, 0, 0, 1])
    zero = [(jnp.zeros((3, 10)), jnp.zeros(10))]
    assert float(image_mlp.cross_entropy(zero, batch)) == pytest.approx(math.log(10))
    assert float(image_mlp.accuracy(zero, batch)) == 0.75
    params = [
        (jnp.array([[1.0, -1.0], [1.0, -1.0], [1.0, -1.0]]), jnp.array([1.0, 2.0])),
        (jnp.array([[2.0], [5.0]]), jnp.array([0.5])),
    ]
    np.testing.assert_allclose(image_mlp.logits(params, batch[0]), np.full((4, 1), 8.5))


@pytest.mark.experiments
def test_further_rates_have_runs_of_their_own():
    settings = dataclasses.replace(lr_schedule.SCALES["smoke"], also_rates=(0.001,), points=3)
    plan = lr_schedule._prepare(settings, "loss").plan
    assert list(plan.methods) == [
        "es_single",
        "es_single, rate 0.001",
        "tbptt",
        "tbptt, rate 0.001",
    ]
    assert plan.points == 3


@pytest.mark.parametrize(
    ("pes", "slow", "holds"),
    [
        ((2.0, 0.1), (0.3, 0.01), [True, True]),
        ((0.1, 0.01), (0.3, 0.01), [False, True]),
        ((2.0, 1.9), (0.2, 0.1), [None, None]),
        ((math.nan, math.nan), (0.3, 0.01), [None, True]),
    ],
)
def test_claims_of_several_rates(pes, slow, holds):
    ends = {"es_single": (0.2, 0.01), "pes": pes, "pes, rate 0.001": slow}
    found = [result(name, lr_schedule.BOUNDED, mean, se) for name, (mean, se) in ends.items()]
    config = {"also_rates": [0.001], "learning_rate": 0.01, "truncation": 1}
    claims = lr_schedule.claims(results.Summary(found, {"config": config}))
    assert [claim.holds for claim in claims[:2]] == holds
    assert "in windows of 1: es_single with rate 0.01 ends below pes" in claims[0].says


@pytest.mark.parametrize(
    ("pes", "single", "louder", "holds"),
    [
        (2.0, 0.22, 5.0, [True] * 6),
        (0.21, 0.22, 5.0, [False, True, True, True, False, True]),
        (2.0, 2.2, 1.0, [False, False, True, False, True, False]),
        (math.nan, 0.22, 5.0, [None, True, True, True, None, True]),
    ],
)
def test_claims_of_windows_of_one_step(pes, single, louder, holds):
    """PES leaves the basin and ES-Single stays, as the noise at a frozen theta predicts."""
    ends = {"es_single": single, "pes": pes, "pes, rate 0.001": 0.3, "es_single, rate 0.001": 0.25}
    found = [result(name, lr_schedule.BOUNDED, mean, 0.001) for name, mean in ends.items()]
    found += [result("pes", "excess", 0.02 * louder, 1e-3), result("grid", "minimum", 0.21, None)]
    found += [result("es_single", "excess", 0.02, 1e-3)]
    config = {"also_rates": [0.001], "learning_rate": 0.01, "truncation": 1}
    claims = lr_schedule.claims(results.Summary(found, {"config": config}))
    assert [claim.holds for claim in claims] == holds


@pytest.mark.experiments
def test_smoke_of_windows_of_one_step(tmp_path):
    settings = dataclasses.replace(
        lr_schedule.SCALES["smoke"],
        objectives=("loss",),
        estimators=("pes", "es_single"),
        truncation=1,
        also_rates=(0.001,),
        final_fraction=1.0,
        out=tmp_path,
    )
    folder = present(framework.execute(lr_schedule.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    assert len(lr_schedule.claims(summary)) == 6
    fast, slow = (
        summary.find("excess", objective="loss", estimator=name)["mean"]
        for name in ("pes", "pes, rate 0.001")
    )
    assert fast == pytest.approx(10 * slow)
    variances = [
        summary.find("variance", objective="loss", estimator=name)["mean"]
        for name in ("pes", "es_single")
    ]
    assert variances[0] > 2 * variances[1]  # 40 windows
