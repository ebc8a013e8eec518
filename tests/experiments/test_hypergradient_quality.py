"""``hypergradient_quality`` at smoke scale, and a second way to its exact hypergradient."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.bilevel import hypergradient_quality as quality
from tests.helpers import present


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(quality.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(quality.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    claims = {claim.says: claim for claim in quality.claims(summary)}
    assert len(claims) == 6  # the claim about 5 terms is missing
    assert claims["CG with as many steps as weights is exact: distance below 1e-6"].holds
    assert claims["unrolling from the minimum is Neumann with the inner rate"].holds
    assert (folder / "figure.png").stat().st_size > 10_000
    assert "terms: cosine, distance" in capsys.readouterr().out
    value = {
        (r.seed, r.labels["method"], int(r.labels["terms"]), r.metric): r.value
        for r in results.read(folder)
    }
    assert {k for _, method, k, _ in value if method == quality.IDENTITY} == {1}
    for seed in settings.seeds:

        def of(metric, method, terms, seed=seed):
            return value[seed, method, terms, metric]

        one = [of("cosine", m, 1) for m in (quality.CG, quality.AUTO, quality.GIVEN)]
        np.testing.assert_allclose(one, of("cosine", quality.IDENTITY, 1), rtol=1e-12)
        assert of("distance", quality.AUTO, 11) < of("distance", quality.AUTO, 1)
        assert of("distance", quality.AUTO, 11) < of("distance", quality.GIVEN, 11)
        apart = of("distance", quality.WARM, 11) - of("distance", quality.MINIMUM, 11)
        assert abs(apart) > 1e-3
        assert of("distance", "Nystrom, rho = 0.001", 11) < 0.2
        assert of("distance", "Nystrom, rho = 0.1", 11) < 1


@pytest.mark.experiments
def test_the_exact_one_is_the_derivative_of_the_minimum(x64):
    data = quality.diabetes(jax.random.key(3), 0.1)
    inner, outer = quality.losses(data)
    theta = jnp.linspace(-7.0, -1.0, quality.WEIGHTS)
    params = quality.minimum(data, theta)
    assert jnp.max(jnp.abs(jax.grad(inner)(params, theta))) < 1e-12
    exact = quality._hypergradient("dense", 0)(data, params, theta, 0.0)
    through = jax.grad(lambda theta: outer(quality.minimum(data, theta), theta))(theta)
    chex.assert_trees_all_close(exact, through, rtol=1e-9, atol=1e-15)


@pytest.mark.experiments
def test_one_prediction_for_each_target(x64):
    """If targets broadcast against predictions, their mean would be fitted with an error of 1."""
    data = quality.diabetes(jax.random.key(0), 0.1)
    assert data.rows.shape == (398, quality.WEIGHTS)
    assert data.targets.shape == (398,)
    assert data.validation_targets.shape == (44,)
    chex.assert_trees_all_close(data.rows[:, :-1].std(0), jnp.ones(10))
    inner, outer = quality.losses(data)
    theta = jnp.full(quality.WEIGHTS, -7.0)
    params = quality.minimum(data, theta)
    assert inner(jnp.zeros_like(params), theta) == pytest.approx(1)
    assert inner(params, theta) < 0.6
    assert outer(params, theta) < 0.8


@pytest.mark.experiments
def test_compare(x64):
    exact = jnp.array([3.0, 4.0])
    assert quality.compare(exact, exact) == {"cosine": 1, "cosine_gap": 0, "distance": 0}
    numbers = quality.compare(jnp.array([-4.0, 3.0]), exact)
    assert numbers["cosine"] == pytest.approx(0, abs=1e-15)
    assert numbers["distance"] == pytest.approx(2**0.5)


def test_claims_can_fail():
    config = {"terms": [1, 5, 11]}
    rows = {
        (quality.CG, "cosine"): 0.5,
        (quality.CG, "distance"): 1e-3,
        (quality.GIVEN, "cosine"): 0.4,
        (quality.GIVEN, "gain"): -0.1,
        (quality.GIVEN, "fall"): 0.1,
        (quality.MINIMUM, "apart"): 1e-3,
    }
    found = [
        {"method": method, "terms": str(k), "metric": metric, "mean": mean, "se": 1e-4, "n": 3}
        for (method, metric), mean in rows.items()
        for k in config["terms"]
    ]
    claims = quality.claims(results.Summary(found, {"config": config}))
    assert [claim.holds for claim in claims] == [False] * 5
