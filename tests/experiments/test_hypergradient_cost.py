"""``hypergradient_cost`` at smoke scale; its solvers compute the same hypergradient."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import hypergradient_cost
from tests.helpers import present

pytestmark = pytest.mark.experiments


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(hypergradient_cost.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(hypergradient_cost.EXPERIMENT, settings))
    records = results.read(folder)
    assert {r.labels["kind"] for r in records} >= {"floor", "unrolled", "neumann", "CG"}
    assert {r.metric for r in records} == {"seconds", "over_floor", "mebibytes"}
    assert all(r.value > 0 for r in records)
    assert "3 products" in capsys.readouterr().out
    assert len(hypergradient_cost.claims(results.read_summary(folder))) == 8


def test_the_solvers_agree():
    """With as many products as weights they solve the same system exactly."""
    problem = hypergradient_cost.problem(jax.random.key(0), 2, 8, 5)
    found = hypergradient_cost.kinds(problem, 40)
    grads = [found[name](problem.params, problem.theta) for name in found if "CG" in name]
    series = hypergradient_cost.ug.implicit.hypergradient(
        problem.outer, problem.inner, solver=hypergradient_cost.ug.implicit.neumann(500)
    )
    grads.append(series(problem.params, problem.theta).grad)
    for grad in grads:
        np.testing.assert_allclose(grad, grads[-1], rtol=1e-2, atol=1e-5)
