"""``population_speed``, ``low_rank_variance`` and ``low_rank_training``: smoke scale and claims."""

import dataclasses

import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.cost import population_speed
from experiments.estimators import low_rank_training, low_rank_variance
from tests.helpers import present

pytest.importorskip("quax", reason="structured noise needs the extra `lowrank`")


def smoke(module, tmp_path):
    settings = dataclasses.replace(module.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(module.EXPERIMENT, settings))
    records, summary = results.read(folder), results.read_summary(folder)
    assert all(claim.holds is not True for claim in module.claims(summary))  # one seed
    return {(*r.labels.values(), r.step, r.metric): r.value for r in records}


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    speed = smoke(population_speed, tmp_path)
    kinds = (*population_speed.FACTORS, *population_speed.DENSE)
    assert all(speed["1", kind, None, "speed"] > 0 for kind in kinds)
    assert speed["2", "inference", None, "speed"] == 1
    variance = smoke(low_rank_variance, tmp_path)
    for law in ("gaussian", "signs", "gaussian, rank 1", "signs, rank 1"):
        exact = variance["linear", law, None, "exact"]
        # A thousand estimates: their standard error is about a tenth.
        assert variance["linear", law, None, "variance"] == pytest.approx(exact, rel=0.3)
        assert np.isfinite(variance["copy_task", law, None, "variance"])
    training = smoke(low_rank_training, tmp_path)
    losses = [training["lstm", law, 0, "loss"] for law in low_rank_training.LAWS]
    assert losses[0] == losses[1]  # both begin at the same theta
    for law in low_rank_training.LAWS:
        assert training["lstm", law, 4, "loss"] != losses[0]
        assert training["lstm", law, None, "seconds_per_update"] > 0
    assert "loss_at_equal_seconds, by seed" in capsys.readouterr().out


def row(metric, mean, se, **labels):
    return {"metric": metric, "mean": mean, "se": se, "n": 5, **labels}


@pytest.mark.parametrize(
    ("given", "drawn", "dense", "holds"),
    [
        ((0.95, 1.0), (0.9, 0.8), (0.01, 0.02), [True, True, True]),
        ((0.95, 0.8), (0.9, 0.5), (0.01, 0.5), [False, False, False]),
        ((0.95, 0.9), (0.9, float("nan")), (0.01, 0.02), [None, None, None]),
    ],
)
def test_speed(given, drawn, dense, holds):
    kinds = {"factors given": given, "factors drawn": drawn, "dense drawn": dense}
    found = [
        row("speed", value, 0.01 * value, batch_size=size, kind=kind)
        for kind, values in kinds.items()
        for size, value in zip(("1", "8"), values, strict=True)
    ]
    summary = results.Summary(found, {"config": {"batch_sizes": [1, 8]}})
    assert [claim.holds for claim in population_speed.claims(summary)] == holds


@pytest.mark.parametrize(
    ("factor", "holds"),
    [(1.0, [True] * 6), (1.3, [True, True, False, False, False, None])],
)
def test_variance(factor, holds):
    """With other variances of rank 1 their formulas and the bound on the signs' are refuted."""
    exact = low_rank_variance.closed_forms((1,))
    found = []
    for law, value in exact.items():
        mean = value * (factor if law == "signs, rank 1" else 1.0)
        if law == "gaussian, rank 1" and factor > 1:
            mean = exact["gaussian"]
        found.append(row("variance", mean, 0.005, problem="linear", law=law))
    config = {"problems": ["linear"], "ranks": [1]}
    claims = low_rank_variance.claims(results.Summary(found, {"config": config}))
    assert [claim.holds for claim in claims] == holds


@pytest.mark.parametrize(
    ("thin", "holds"),
    [((0.1, 0.5, 0.05), [True, True, True]), ((0.2, 2.0, 0.3), [False, False, False])],
)
def test_training(thin, holds):
    values = {"rank one": thin, "dense": (0.1, 1.0, 0.1)}
    metrics = ("loss", "seconds_per_update", "loss_at_equal_seconds")
    found = [
        row(metric, value, 0.003, problem="lstm", estimator=law)
        for law, of_law in values.items()
        for metric, value in zip(metrics, of_law, strict=True)
    ]
    summary = results.Summary(found, {"config": {"problems": ["lstm"]}})
    assert [claim.holds for claim in low_rank_training.claims(summary)] == holds
