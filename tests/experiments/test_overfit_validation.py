"""``overfit_validation`` at smoke scale: the decay rates fit the validation images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.bilevel import overfit_validation as overfit
from tests.helpers import present


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(overfit.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(overfit.EXPERIMENT, settings))
    summary = results.read_summary(folder)

    def last(metric, decay):
        return summary.find(metric, model="linear", decay=decay)["mean"]

    assert last("weights", "tuned") == 64 * 10 + 10
    assert last("train", "tuned") > 0.95
    assert last("validation", "tuned") > 0.95
    assert last("validation", "tuned") > last("validation", "fixed") + 0.1
    assert last("test", "tuned") < last("validation", "tuned") - 0.05
    assert last("loss", "tuned") < 0.5 * last("loss", "fixed")
    steps = [r.step for r in results.read(folder) if r.metric == "test"]
    assert steps == 2 * list(range(25, 501, 25))
    claims = overfit.claims(summary)
    assert [claim.says.split()[0] for claim in claims] == ["linear:", "linear:"]
    assert claims[0].holds == (last("validation", "tuned") == 1)
    assert (folder / "figure.png").stat().st_size > 10_000
    assert "decay tuned:  train" in capsys.readouterr().out


@pytest.mark.experiments
def test_what_is_tuned():
    """Every weight has a decay rate; tuning moves them up and down, and nothing else does."""
    settings = dataclasses.replace(overfit.SCALES["smoke"], num_steps=20, points=2, hidden=3)
    tuned, accuracies = overfit.tune(settings, jax.random.key(0), "mlp", True)
    fixed, _ = overfit.tune(settings, jax.random.key(0), "mlp", False)
    assert accuracies.shape == (2, 3)
    assert np.all((accuracies >= 0) & (accuracies <= 1))
    shapes = [leaf.shape for leaf in jax.tree.leaves(tuned.theta)]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(tuned.params)]
    moved = jnp.concatenate([jnp.ravel(x + 4) for x in jax.tree.leaves(tuned.theta)])
    assert jnp.mean(moved != 0) > 0.9
    assert jnp.any(moved > 0)
    assert jnp.any(moved < 0)
    assert all(jnp.all(x == -4) for x in jax.tree.leaves(fixed.theta))


def test_claims_can_fail():
    means = {"train": 1.0, "validation": 0.98, "test": 0.95, "weights": 650.0}
    found = [
        {"model": "linear", "decay": decay, "metric": metric, "mean": mean, "se": 0.0, "n": 3}
        for metric, mean in means.items()
        for decay in (overfit.TUNED, overfit.FIXED)
    ]
    claims = overfit.claims(results.Summary(found, {}))
    assert len(claims) == 2
    assert not any(claim.holds for claim in claims)
