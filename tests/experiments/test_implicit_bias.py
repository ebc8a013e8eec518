"""``implicit_bias`` at smoke scale, against a few lines of numpy and the closed forms."""

import dataclasses
import math

import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.bilevel import implicit_bias
from tests.helpers import present


def projections(theta, rate, num_steps, warm):
    """The same descent by hand: w goes to the nearest point of the line, theta downhill."""
    base, path = np.zeros(2), []
    for _ in range(num_steps):
        x = np.array([math.cos(theta), math.sin(theta)])
        across = np.array([-x[1], x[0]])
        w = base + (1 - x @ base) * x
        slope = (1 - x @ base) * across - (across @ base) * x
        path.append((theta, *w))
        theta -= rate * slope @ (w - np.array([2.0, 0.0])) / 2
        base = w if warm else base
    return np.array(path)


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(implicit_bias.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(implicit_bias.EXPERIMENT, settings))
    records, summary = results.read(folder), results.read_summary(folder)
    assert (folder / "figure.png").stat().st_size > 0
    assert "re-trained" in capsys.readouterr().out
    every = settings.num_steps // settings.points
    for method in ("cold", "warm"):
        for start in settings.starts:
            labels = {"method": method, "start": f"{start:.3f}"}
            lines = [r for r in records if r.labels == labels]
            path = np.array(
                [[r.value for r in lines if r.metric == m] for m in ("theta", "w1", "w2", "loss")]
            ).T
            by_hand = projections(
                start, settings.learning_rate, settings.num_steps, method == "warm"
            )
            np.testing.assert_allclose(path[0, :3], by_hand[0], atol=1e-5)
            np.testing.assert_allclose(path[1:, :3], by_hand[every - 1 :: every], atol=1e-4)
            loss = np.sum((path[:, 1:3] - [2.0, 0.0]) ** 2, axis=1) / 4
            np.testing.assert_allclose(path[:, 3], loss, atol=1e-12)
            _check_curve(path, start, method)
    found = {claim.says: claim for claim in implicit_bias.claims(summary)}
    assert len(found) == 7
    # The outer steps are twenty times as large, so that the limit of small ones is further away.
    first, *others = found.values()
    assert not first.holds
    assert summary.find("loss", method="warm", start="-0.685")["mean"] < 1e-5
    assert [claim.holds for claim in others if "warm: the outer" not in claim.says] == [True] * 5


def _check_curve(path, start, method):
    """Cold solutions lie on the circle, warm ones on the involute, up to the outer rate."""
    theta, w = path[:, 0], path[:, 1:3]
    if method == "cold":
        np.testing.assert_allclose(np.linalg.norm(w, axis=1), 1, atol=1e-5)
        return
    x = np.stack([np.cos(theta), np.sin(theta)], axis=1)
    across = np.stack([-np.sin(theta), np.cos(theta)], axis=1)
    involute = x - (theta - start)[:, None] * across
    np.testing.assert_allclose(w, involute, atol=0.02)
    assert np.abs(np.linalg.norm(w, axis=1) - 1).max() > 0.3  # it is not the circle


def test_a_start_without_a_closed_form():
    for start in (0.0, 1.2):
        settings = dataclasses.replace(implicit_bias.SCALES["smoke"], starts=(start,))
        with pytest.raises(ValueError, match=r"`starts` must be in \(-1.047, 1.047\) and not 0"):
            implicit_bias.fill(settings)
    settings = dataclasses.replace(implicit_bias.SCALES["smoke"], points=7)
    with pytest.raises(ValueError, match="`points`=7 must divide num_steps=4000"):
        implicit_bias.fill(settings)
