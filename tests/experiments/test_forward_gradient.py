"""``forward_gradient`` at smoke scale; its claims can fail."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import forward_gradient
from tests.helpers import present


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(forward_gradient.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(forward_gradient.EXPERIMENT, settings))
    records = results.read(folder)
    for kind in forward_gradient.KINDS:
        found = [r.value for r in records if (r.labels["estimator"], r.metric) == (kind, "seconds")]
        assert len(found) == len(settings.widths)
        assert min(found) > 0
    steps = {
        name: {r.step for r in records if r.labels["estimator"] == name and r.step is not None}
        for name in ("dodge", "bptt")
    }
    assert steps == {"dodge": {4, 8}, "bptt": {2, 4}}  # twice as many updates
    claims = forward_gradient.claims(results.read_summary(folder))
    assert [claim.holds for claim in claims] == [None] * 3  # one seed
    assert "loss after 8 updates" in capsys.readouterr().out


@pytest.mark.experiments
def test_both_estimate_the_same_gradient():
    """The mean of dodge's gradients over directions tends to bptt's, on the same batch."""
    key, theta = jax.random.key(0), forward_gradient.weights(jax.random.key(1), 4)
    dodge, bptt = (forward_gradient.estimators(4)[name] for name in ("dodge", "bptt"))
    exact, _ = bptt.estimate(key, theta, bptt.init(key, theta))
    estimate, _ = dodge.estimate(key, theta, dodge.init(key, theta))
    np.testing.assert_allclose(estimate.loss, exact.loss, rtol=1e-5)
    signs = jax.tree.map(lambda g, e: np.sum(np.asarray(g * e)), estimate.grad, exact.grad)
    slope = sum(jax.tree.leaves(signs))  # (u . g)^2 of a direction of signs u
    size = np.abs(np.concatenate([np.ravel(g) for g in jax.tree.leaves(estimate.grad)]))
    np.testing.assert_allclose(size, np.sqrt(slope), rtol=1e-3)


def row(part, width, name, metric, mean, se=0.01):
    labels = {"part": part, "width": str(width), "estimator": name, "metric": metric}
    return {**labels, "mean": mean, "se": se, "n": 5}


@pytest.mark.parametrize(
    ("ratios", "losses", "holds"),
    [
        ((0.4, 0.3), (0.1, 0.5), [True, True, True]),
        ((0.4, 0.7), (0.5, 0.1), [True, False, False]),
        ((0.4, 1.2), (0.5, 0.5), [False, False, None]),
        ((0.4, float("nan")), (float("nan"), 0.1), [None, None, None]),
    ],
)
def test_claims_can_fail(ratios, losses, holds):
    config = {"widths": [64, 256], "trained_widths": [64]}
    found = [
        row("time", w, "dodge", "over_bptt", x) for w, x in zip((64, 256), ratios, strict=True)
    ]
    found += [
        row("training", 64, name, "training_loss", x)
        for name, x in zip(("dodge", "bptt"), losses, strict=True)
    ]
    claims = forward_gradient.claims(results.Summary(found, {"config": config}))
    assert [claim.holds for claim in claims] == holds
