"""``telescoping`` at smoke scale: the loss at the end, on a fixed batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import telescoping
from experiments.problems import data, image_mlp
from tests.helpers import present
from tests.stored import expect


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(telescoping.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(telescoping.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    claims = telescoping.claims(summary)
    assert len(claims) == 3
    assert all(claim.holds is None for claim in claims)
    records = results.read(folder)
    cells = [r.value for r in records if r.metric == "J" and r.labels["estimator"] == "grid"]
    assert len(cells) == 6
    lines = [r for r in records if r.metric == "J" and r.labels["estimator"] == "pes"]
    assert [r.step for r in lines] == list(range(settings.num_steps + 1))
    assert "the minimum of the grid is" in capsys.readouterr().out
    way = np.array(
        [
            [r.value for r in records if r.metric == name and r.labels["estimator"] == "pes"]
            for name in ("log_theta0", "log_theta1")
        ]
    ).T
    rough = summary.find("roughness", estimator="pes")["mean"]
    assert rough == pytest.approx(telescoping.roughness(way), rel=1e-4)
    expect("telescoping experiment", {"minimum": min(cells), "start": lines[0].value})


@pytest.mark.experiments
def test_j_is_the_loss_of_the_last_weights():
    """Steps have no loss; the last weights have their loss on the first training images."""
    settings = dataclasses.replace(telescoping.SCALES["smoke"], horizon=3, truncation=1)
    problem = telescoping.final_problem(settings)
    theta = jnp.log(jnp.array([0.1, 2.0]))
    key = jax.random.key(0)
    state, step = jax.jit(problem.init)(key, theta), jax.jit(problem.step)
    for t in range(3):
        state, loss = step(jax.random.fold_in(key, t), theta, state, t)
        assert loss == 0
    train = data.load("digits").train
    batch = jnp.asarray(train.images[:20]), jnp.asarray(train.labels[:20])
    wanted = image_mlp.cross_entropy(state.params, batch)
    found = present(problem.evaluate)(key, theta, state)
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_roughness():
    """A straight path has roughness 0; a zigzag of steps 1 turns by 2 in one coordinate."""
    assert telescoping.roughness(np.outer(np.arange(5), [1.0, 3.0])) == pytest.approx(0)
    zigzag = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert telescoping.roughness(zigzag) == pytest.approx(2)


@pytest.mark.parametrize(("pes", "comes_out"), [(0.5, True), (0.11, None), (0.05, False)])
def test_claims_can_fail(pes, comes_out):
    def result(estimator, metric, mean, se=0.01):
        return {"estimator": estimator, "metric": metric, "mean": mean, "se": se, "n": 3}

    found = [{**result("grid", "minimum", 0.1, None), "n": 1}, result("truncated_es", "J", 0.15)]
    found += [result("es_single", "roughness", 0.1), result("pes", "roughness", pes)]
    far, smoother = telescoping.claims(results.Summary(found, {}))
    assert far.holds is False
    assert smoother.holds is comes_out
