"""``global_lr`` at smoke scale: the noise of PES grows along an episode."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import global_lr
from tests.helpers import present
from tests.stored import expect


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(global_lr.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(global_lr.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    claims = global_lr.claims(summary)
    assert len(claims) == 4
    assert all(claim.holds is None for claim in claims)
    assert summary.find("ratio", estimator=global_lr.RATIO)["mean"] > 1.5
    records = results.read(folder)
    sds = {name: global_lr.sds_by_seed(records)[name][0] for name in settings.estimators}
    assert [len(sd) for sd in sds.values()] == [20, 20]
    way = [r.value for r in records if r.metric == "log_rate" and r.labels["estimator"] == "pes"]
    spread = summary.find("spread", estimator="pes")["mean"]
    assert spread == pytest.approx(global_lr.spread(np.array(way)), rel=1e-4)
    np.testing.assert_allclose(sds["pes"][0], sds["es_single"][0], rtol=1e-4)
    assert "noise ~ k^b" in capsys.readouterr().out
    grid = summary.find("minimum", estimator="grid")["mean"]
    expect("global_lr experiment", {"minimum": grid, "sd of window 1": float(sds["pes"][0])})


@pytest.mark.experiments
@pytest.mark.parametrize("name", ["pes", "es_single"])
def test_noise_of_losses_without_memory(name):
    """For losses theta e_t the deviation of PES is sqrt(k + 1) |e|, and of ES-Single sqrt(2) |e|.

    PES multiplies window k's loss by the sum of k draws: Var[u (u + k - 1 others)] = 2 + (k - 1).
    """
    problem = ug.UnrolledProblem(
        lambda key, theta: jnp.float32(0),
        lambda key, theta, state, t: (state, theta * (1.0 - 2 * (t % 2))),
        16,
    )
    estimator = ug.REGISTRY[name].build(problem, truncation=1, sigma=0.1, num_pairs=1)
    sds = global_lr.window_sds(estimator, 16, 20_000, jax.random.key(0), jnp.float32(0.3))
    k = np.arange(1, 17)
    wanted = np.sqrt(k + 1) if name == "pes" else np.full(16, np.sqrt(2))
    np.testing.assert_allclose(sds, wanted, rtol=0.06)


@pytest.mark.parametrize("power", [-0.3, 0.0, 0.5])
def test_slope(power):
    """The slope of a power of k is its exponent; the first fifth of the points is ignored."""
    sds = 3.0 * np.arange(1.0, 51) ** power
    sds[:10] = 7
    assert global_lr.slope(sds) == pytest.approx(power, abs=1e-6)


def test_spread():
    """The first half of the way does not count."""
    assert global_lr.spread(np.array([9.0, -9.0, 1.0, 3.0])) == pytest.approx(np.sqrt(2))


def claimed(pes, single, ratio, spread):
    def result(estimator, metric, mean):
        return {"estimator": estimator, "metric": metric, "mean": mean, "se": 0.02, "n": 5}

    slopes = {"pes": pes, "es_single": single, global_lr.RATIO: ratio}
    found = [result(name, "slope", b) for name, b in slopes.items()]
    found += [result("pes", "spread", 0.3), result("es_single", "spread", spread)]
    return [claim.holds for claim in global_lr.claims(results.Summary(found, {}))]


def test_claims_can_fail():
    """In order: the ratio, PES, ES-Single, the spread."""
    assert claimed(0.5, 0.0, 0.5, 0.1) == [True] * 4
    assert claimed(-0.1, 0.2, 0.7, 0.5) == [False] * 4
    assert claimed(0.03, 0.09, 0.59, 0.29) == [None] * 4
    assert claimed(*[np.nan] * 4) == [None] * 4
