"""``reward_mixture``: the mixture's closed forms, and the experiment at smoke scale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.samplers import eight_gaussians as mixture
from experiments.samplers import reward_mixture
from tests.helpers import present

pytestmark = pytest.mark.experiments

KEY = jax.random.key(0)


def test_the_tilted_law_is_the_data_reweighted():
    """Weights, mean and variance agree with importance weights exp(scale reward) of data."""
    scale, n = 0.1, 200_000
    x = mixture.draw(mixture.tilted(0.0), KEY, n)
    weights = jnp.exp(scale * jax.vmap(mixture.reward)(x))
    weights = np.asarray(weights / weights.sum())
    law = mixture.tilted(scale)
    error = float(4 / np.sqrt(1 / np.sum(weights**2)))  # four standard errors of a share
    nearest = np.argmin(np.sum((np.asarray(x)[:, None] - mixture.MEANS) ** 2, -1), -1)
    shares = np.bincount(nearest, weights, minlength=8)
    np.testing.assert_allclose(shares, law.weights, atol=error)
    np.testing.assert_allclose(weights @ np.asarray(x), law.weights @ law.means, atol=4 * error)
    first = np.asarray(x)[nearest == 0], weights[nearest == 0]
    variance = np.average((first[0] - law.means[0]) ** 2, axis=0, weights=first[1])
    np.testing.assert_allclose(variance, law.variance, rtol=0.05)
    assert mixture.mean_reward(law) == pytest.approx(
        float(weights @ np.asarray(jax.vmap(mixture.reward)(x))), abs=30 * error
    )
    assert abs(law.weights[0] - 1 / 8) > 10 * error  # the data's own law is told apart


def test_divergences_of_known_laws():
    """About 0 for samples of the law itself, and the closed form for samples of a tilted one."""
    data, law = mixture.tilted(0.0), mixture.tilted(0.1)
    x = mixture.draw(law, KEY, 4096)
    (exact,), (reward,) = mixture.frontier(np.array([0.1]))
    assert abs(float(mixture.divergence(x, law))) < 0.06
    assert float(mixture.divergence(x, data)) == pytest.approx(exact, abs=0.06)
    assert float(mixture.mode_divergence(x, law)) < 0.005
    assert float(mixture.mode_divergence(x, data)) > 0.3
    assert reward == pytest.approx(mixture.mean_reward(law))


def test_the_velocity_is_the_conditional_mean():
    """E[data - noise | x] by weighting drawn pairs near a point."""
    t, point = jnp.float32(0.6), jnp.array([1.5, 0.4])
    data = mixture.draw(mixture.tilted(0.0), KEY, 400_000)
    noise = jax.random.normal(jax.random.key(1), data.shape)
    x = t * data + (1 - t) * noise
    near = jnp.exp(-jnp.sum((x - point) ** 2, -1) / (2 * 0.05**2))
    mean = near @ (data - noise) / near.sum()
    np.testing.assert_allclose(mixture.velocity(point, t), mean, atol=0.15)


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(reward_mixture.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(reward_mixture.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    names = {r["estimator"] for r in summary.results}
    assert {"DRaFT", "DRaFT-LV", "ES", "adjoint matching, basic"} < names
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    for name in names:
        spent = present(summary.find("evaluations", estimator=name, place=""))["mean"]
        assert 0.6 * settings.budget < spent <= settings.budget
    assert all(claim.holds is None for claim in reward_mixture.EXPERIMENT.claims(summary))
