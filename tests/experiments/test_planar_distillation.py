"""``planar_distillation`` at smoke scale; its data and its claims."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.bilevel import planar_distillation
from experiments.bilevel.planar_distillation_figure import CELLS
from tests.helpers import present


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(planar_distillation.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(planar_distillation.EXPERIMENT, settings))
    records = results.read(folder)
    paths = [r for r in records if r.metric == "x0"]
    assert [(r.labels["start"], r.step) for r in paths] == [
        ("warm", 2), ("warm", 4), ("cold", 2), ("cold", 4)
    ]  # fmt: skip
    assert sum(r.metric == "output" for r in records) == 6 * CELLS**2
    # A cold start that is trained anew with its last theta gives its network again.
    ends = {
        r.labels["network"]: r.value
        for r in records
        if r.metric == "accuracy_at_end" and r.labels["start"] == "cold"
    }
    assert ends["at the end"] == ends["trained anew"]
    claims = planar_distillation.claims(results.read_summary(folder))
    assert [claim.holds for claim in claims] == [None] * 3  # one seed
    assert "warm start" in capsys.readouterr().out


@pytest.mark.experiments
def test_the_ring_surrounds_the_disc():
    places, targets = planar_distillation.disc_and_ring(jax.random.key(0), 100)
    radius = np.linalg.norm(places, axis=1)
    assert radius[np.asarray(targets) < 0].max() <= 0.6
    assert radius[np.asarray(targets) > 0].min() >= 1
    assert np.sum(np.asarray(targets)) == 0


def row(start, network, mean, se=0.01):
    labels = {"start": start, "network": network, "metric": "accuracy_at_end"}
    return {**labels, "mean": mean, "se": se, "n": 5}


@pytest.mark.parametrize(
    ("warm", "anew", "best", "cold", "holds"),
    [
        (0.99, 0.6, 0.8, 0.7, [True, True, True]),
        (0.7, 0.6, 0.8, 0.7, [True, False, None]),
        (float("nan"), 0.6, 0.8, 0.7, [None, None, None]),
    ],
)
def test_claims_can_fail(warm, anew, best, cold, holds):
    found = [
        row("warm", "at the end", warm),
        row("warm", "trained anew", anew),
        row("warm", "trained anew, best", best),
        row("cold", "at the end", cold),
    ]
    claims = planar_distillation.claims(results.Summary(found, {}))
    assert [claim.holds for claim in claims] == holds
