"""``warm_vs_cold`` at smoke scale; its hypergradient equals plain differentiation."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.bilevel import warm_vs_cold
from tests.helpers import present


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(warm_vs_cold.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(warm_vs_cold.EXPERIMENT, settings))
    records = results.read(folder)
    summary = results.read_summary(folder)
    assert (folder / "figure.png").stat().st_size > 0
    assert "gap" in capsys.readouterr().out
    where = {"part": "antidistillation"}
    pinv = summary.find("distance", **where, case="pinv", method="pinv")
    few = summary.find("distance", **where, case="K = 1", method="neumann")
    more = summary.find("distance", **where, case="K = 20", method="neumann")
    assert pinv["mean"] < 1e-8 < more["mean"] < 0.5 * few["mean"]
    assert summary.find("gap", **where, case="K = 20", method="both")["mean"] < 0.2
    losses = [r.value for r in records if r.metric == "loss" and r.labels["part"] == where["part"]]
    assert len(losses) == 2 * (2 + 2 * len(settings.terms))
    assert max(losses) < 1e-12  # each is a solution of the outer problem
    claims = warm_vs_cold.claims(summary)
    assert len(claims) == 4 + 2 + 2 + 2
    assert all(claim.holds for claim in claims if "falls with K" in claim.says)
    frozen = [claim.holds for claim in claims if " gd 1" in claim.says]
    assert len(frozen) == 2
    assert False not in frozen  # two seeds may be too few to tell
    ends = [r for r in summary.results if (r["metric"], r["method"]) == ("over_cold", "warm")]
    assert all(r["mean"] > warm_vs_cold.BOUND for r in ends if " gd 1" in r["case"])
    _check_one_point(settings, records)


def _check_one_point(settings, records):
    """Each method has a whole curve for each seed, and the stored ends are the curves' ends."""
    lines = [r for r in records if r.labels["part"] == "one point"]
    curves = {}
    for r in lines:
        if r.metric == "loss":
            place = r.seed, r.labels["case"], r.labels["method"]
            curves.setdefault(place, []).append(r.value)
    assert len(curves) == 2 * 4 * 3
    assert {len(curve) for curve in curves.values()} == {warm_vs_cold.KEPT // 10}
    ends = {
        (r.seed, r.labels["case"], r.labels["method"]): r.value for r in lines if r.metric == "end"
    }
    for seed, case, _ in curves:
        cold = ends[seed, case, "cold"]
        assert cold == pytest.approx(curves[seed, case, "cold"][-1], rel=0.02)
        best = ends[seed, case, "re-trained, best"]
        assert best <= ends[seed, case, "re-trained"]
        assert ends[seed, case, "re-trained"] == curves[seed, case, "re-trained"][-1]


@pytest.mark.experiments
def test_the_starts_agree_at_first():
    """At first all train from zero; later only warm start and its retraining differ."""
    settings = dataclasses.replace(warm_vs_cold.SCALES["smoke"], num_steps=warm_vs_cold.KEPT)
    with jax.enable_x64(True):
        drawn = [warm_vs_cold.one_point_data("normal", jax.random.key(i)) for i in range(2)]
        data = jax.tree.map(lambda *x: jnp.stack(x), *drawn)
        paths = warm_vs_cold._descents(settings, "adam 0.1")(data)
        chex.assert_trees_all_close(paths.cold[:, 0], paths.warm[:, 0], paths.again[:, 0])
        assert jnp.all(jnp.abs(paths.warm - paths.again)[:, -1] > 1e-3)


@pytest.mark.experiments
@pytest.mark.parametrize("damping", [1e-4, 0.5])
def test_the_hypergradient_is_that_of_the_nearest_minimum(damping):
    """It equals the derivative through the inner solution's closed form, from a nonzero start."""
    with jax.enable_x64(True):
        data = warm_vs_cold.one_point_data("alternating", jax.random.key(3))
        problem = warm_vs_cold.one_point(data, 10, damping)
        start = 0.3 * jax.random.normal(jax.random.key(4), (21,))

        def solution(theta):
            row = warm_vs_cold.features(theta[0], 10)
            return start + row * (theta[1] - row @ start) / (row @ row + damping)

        theta = jnp.array([0.7, -0.4])
        out = problem.hypergradient(solution(theta), theta)
        direct = jax.grad(lambda theta: problem.outer(solution(theta), theta))(theta)
        chex.assert_trees_all_close(out.grad, direct, rtol=1e-6)
        # one step of the inner optimizer reaches that solution
        grad = jax.grad(problem.inner)(start, theta)
        step, _ = problem.optimizer.update(grad, problem.optimizer.init(start))
        chex.assert_trees_all_close(start + step, solution(theta), rtol=1e-10)


@pytest.mark.experiments
def test_data():
    """Real points are spread over (-pi, pi); alternating targets alternate."""
    for seed in range(5):
        data = warm_vs_cold.one_point_data("alternating", jax.random.key(seed))
        gaps = np.diff(np.asarray(data.x))
        assert gaps.min() > 0.4 * np.pi * 0.4
        assert np.abs(np.asarray(data.x)).max() < np.pi
        assert np.all(np.sign(data.y) == [1, -1, 1, -1, 1])


def test_steps_that_cannot_be_kept(tmp_path):
    settings = dataclasses.replace(warm_vs_cold.SCALES["smoke"], out=tmp_path, num_steps=750)
    with pytest.raises(ValueError, match=r"`num_steps` must be a multiple of 500; got 750\."):
        framework.execute(warm_vs_cold.EXPERIMENT, settings)
    assert not list(tmp_path.iterdir())
