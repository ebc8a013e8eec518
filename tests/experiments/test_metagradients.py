"""Experiments on metagradients at smoke scale, and their parts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import replay_cost
from experiments.metagradients import (
    attribution,
    data_selection,
    digit_training,
    metasmoothness,
    schedule_by_metagradient,
    scores,
)
from tests.helpers import present

pytestmark = pytest.mark.experiments

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        attribution,
        data_selection,
        metasmoothness,
        replay_cost,
        schedule_by_metagradient,
    )
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_smoke(name, tmp_path, capsys):
    experiment = EXPERIMENTS[name]
    settings = dataclasses.replace(experiment.scales["smoke"], out=tmp_path)
    folder = present(framework.execute(experiment, settings))
    assert all(np.isfinite(r.value) for r in results.read(folder))
    made = experiment.claims(results.read_summary(folder))
    assert made
    # One seed cannot decide what is about the spread over seeds.
    assert all(claim.holds is None for claim in made) or name in ("replay_cost", "metasmoothness")
    assert "table and picture" in capsys.readouterr().out


def test_agreement_is_a_mean_of_rank_correlations():
    measured = np.array([[1.0, 3.0], [2.0, 2.0], [30.0, 1.0], [4.0, 0.0]])
    assert attribution.agreement(measured**3, measured) == pytest.approx(1)
    assert attribution.agreement(measured * [1, -1], measured) == pytest.approx(0)
    # By hand: ranks 1 2 4 3 and 1 2 3 4; 1 - 6 (1 + 1) / (4 * 15) = 0.8.
    assert attribution.agreement(np.arange(4.0)[:, None], measured[:, :1]) == pytest.approx(0.8)
    assert attribution.agreement(np.zeros((4, 1)), measured[:, :1]) == 0


@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_scores_are_slopes(net):
    """The metagradient is that of finite differences; TracIn's dot products are one SGD step's."""
    recipe = digit_training.Recipe(net=net, width=8, horizon=10, batch_size=20, eps_root=1e-4)
    settings = dataclasses.replace(attribution.SCALES["smoke"], num_train=30, num_targets=2)
    with jax.enable_x64(True):
        here, targets, _ = attribution.drawn(settings, recipe, 0)
        ones = jnp.ones(30)
        slopes = scores.exact(recipe, here, ones, targets)
        moved = [
            attribution.losses(recipe, here, (ones.at[3].add(h))[None], targets)[0]
            for h in (1e-4, -1e-4)
        ]
        np.testing.assert_allclose(slopes[:, 3], (moved[0] - moved[1]) / 2e-4, rtol=1e-5)
        products, cosines = scores.dots(recipe, here.start, here.train, targets)

        def after(step):
            def loss(params):
                image = jax.tree.map(lambda x: x[5:6], here.train)
                return scores.target_loss(recipe, params, image)

            grads = jax.grad(loss)(here.start)
            params = jax.tree.map(lambda p, g: p - step * g, here.start, grads)
            target = jax.tree.map(lambda x: x[1], targets)
            return scores.target_loss(recipe, params, target)

        np.testing.assert_allclose(products[1, 5], jax.grad(after)(0.0), rtol=1e-5)
        assert float(jnp.max(jnp.abs(cosines))) <= 1


def test_contributions_of_the_steps_add_up():
    """A step's own weights: their metagradients sum to that of weights for all steps."""
    recipe = digit_training.Recipe(width=8, horizon=10, batch_size=20, eps_root=1e-4)
    settings = dataclasses.replace(attribution.SCALES["smoke"], num_train=30, num_targets=2)
    here, targets, _ = attribution.drawn(settings, recipe, 0)
    each = metasmoothness.by_step(recipe, here, targets)
    whole = scores.exact(recipe, here, jnp.ones(30), targets)[0]
    np.testing.assert_allclose(jnp.sum(each, 0), whole, rtol=1e-4, atol=1e-7)
