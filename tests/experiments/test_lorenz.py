"""``lorenz`` at smoke scale: NRES finds the constants of a short, regular trajectory."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

import unrollgrad as ug
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments._framework.results import Summary
from experiments.estimators import lorenz
from tests.helpers import present
from tests.stored import expect


@pytest.mark.experiments
def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(lorenz.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(lorenz.EXPERIMENT, settings))
    summary, records = results.read_summary(folder), results.read(folder)
    assert [claim.holds for claim in lorenz.claims(summary)] == [None, None]  # one seed
    assert summary.find("learned", estimator="nres")["mean"] == 1
    assert summary.find("learned", estimator="bptt")["mean"] == 0
    assert summary.find("error", estimator="nres")["mean"] < 0.02
    assert "error of a, r" in capsys.readouterr().out
    points = lorenz.POINTS + 1
    assert len(records) == len(settings.estimators) * (points * 7 + 3)
    whole = summary.find("inner_steps", estimator="bptt")["mean"]
    assert summary.find("inner_steps_needed", estimator="bptt")["mean"] == whole
    expect("lorenz experiment", {"r": summary.find("r", estimator="nres")["mean"]})


@pytest.mark.experiments
def test_nothing_is_lost_at_the_truth_from_any_start():
    problem, theta = ug.problems.lorenz(200)
    truth = jnp.log(jnp.array(lorenz.TRUTH, jnp.float32))
    key = jax.random.key(1)
    loss = jax.jit(lambda theta: ug.episode_loss(lorenz.perturbed(problem), key, theta))
    assert float(loss(truth)) == pytest.approx(0, abs=1e-6)
    assert float(loss(theta)) > 100
    numbers = lorenz.evaluate(problem, 2, truth + jnp.log(jnp.array([1.1, 0.97])))
    assert float(numbers["error"]) == pytest.approx(0.1, rel=1e-4)
    assert float(numbers["a"]) == pytest.approx(11, rel=1e-4)


def comparisons(nres, pes, learned=(1.0, 1.0), n=5):
    """The verdicts on the work of NRES and PES, with an error of 1."""
    means = {"nres": nres, "pes": pes}
    found = [
        {"metric": metric, "estimator": name, "mean": mean, "se": 1.0, "n": n}
        for name, mean in means.items()
        for metric in lorenz.NEEDED
    ]
    found += [
        {"metric": "learned", "estimator": name, "mean": share, "se": 0.0, "n": n}
        for name, share in zip(means, learned, strict=True)
    ]
    about = {"config": {"horizon": 100, "enough": 0.01}}
    claims = lorenz.claims(Summary(found, about))
    assert all("than pes" in claim.says for claim in claims)
    return [claim.holds for claim in claims]


def test_who_learns_sooner():
    assert comparisons(10.0, 20.0) == [True] * 2
    assert comparisons(20.0, 10.0) == [False] * 2
    assert comparisons(10.0, 11.0) == [None] * 2  # within the seeds' spread
    assert comparisons(10.0, 20.0, (1.0, 0.0)) == [True] * 2  # PES needs even more
    assert comparisons(10.0, 20.0, (0.8, 1.0)) == [None] * 2  # so may NRES
    assert comparisons(math.nan, 20.0, (math.nan, 1.0)) == [None] * 2


@pytest.mark.parametrize(("name", "learns"), [("nres", True), ("bptt", False)])
def test_who_learns(name, learns):
    def holds(left):
        found = [{"metric": "left", "estimator": name, "mean": left, "se": 0.001, "n": 5}]
        (claim,) = lorenz.claims(Summary(found, {"config": {"horizon": 100, "enough": 0.01}}))
        return claim.holds

    assert [holds(0.001), holds(0.5), holds(0.01), holds(math.nan)] == [
        learns,
        not learns,
        None,
        None,
    ]


def test_every_estimator_needs_a_rate(tmp_path):
    settings = dataclasses.replace(lorenz.SCALES["smoke"], out=tmp_path, learning_rates=(1.0,))
    with pytest.raises(ValueError, match=r"learning_rates.*for each"):
        framework.execute(lorenz.EXPERIMENT, settings)
