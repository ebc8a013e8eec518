"""``data_cleaning`` at smoke scale: the sets, the inner minimum, and cleaning's gain."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.bilevel import data_cleaning
from tests.helpers import present

pytestmark = pytest.mark.experiments

SMOKE = data_cleaning.SCALES["smoke"]


def test_the_sets():
    here = data_cleaning.task(SMOKE, 3)
    true = data_cleaning.digits(jax.random.split(jax.random.key(3), 3)[0], 400, 200)
    assert [len(x.labels) for x in here[:3]] == [400, 200, 1197]
    assert int(here.wrong.sum()) == 200
    np.testing.assert_array_equal(here.train.labels != true[0].labels, here.wrong)
    np.testing.assert_array_equal(here.test.labels, true[2].labels)
    rows = np.concatenate([np.asarray(x.images) for x in here[:3]])
    assert rows.min() == 0
    assert rows.max() == 1
    other = data_cleaning.task(SMOKE, 4)
    assert not np.array_equal(other.test.labels, here.test.labels)


def test_training_reaches_the_minimum():
    """The gradient vanishes at the minimum, and an image of weight zero has no influence."""
    here = data_cleaning.task(SMOKE, 0)
    _, inner = data_cleaning.losses(here, SMOKE.decay)

    def loss(params, theta):
        return inner(params, theta) / SMOKE.num_train

    start = jnp.zeros(SMOKE.num_train)
    params = jax.jit(lambda: data_cleaning.minimise(lambda p: loss(p, start)))()
    before = float(optax.tree.norm(jax.grad(loss)(data_cleaning.zeros(), start)))
    assert float(optax.tree.norm(jax.grad(loss)(params, start))) < 1e-4 * before
    dropped = jnp.where(here.wrong, -jnp.inf, 0.0)
    changed = here._replace(
        train=here.train._replace(labels=jnp.where(here.wrong, 0, here.train.labels))
    )
    _, other = data_cleaning.losses(changed, SMOKE.decay)
    np.testing.assert_allclose(inner(params, dropped), other(params, dropped), rtol=1e-6)
    assert np.isfinite(inner(params, dropped))


def test_auc():
    wrong = jnp.array([True, True, False, False])
    assert data_cleaning.auc(jnp.array([0.0, 1.0, 2.0, 3.0]), wrong) == 1
    assert data_cleaning.auc(jnp.array([0.0, 2.0, 1.0, 3.0]), wrong) == 0.75
    assert data_cleaning.auc(jnp.zeros(4), wrong) == 0.5


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(SMOKE, out=tmp_path)
    folder = present(framework.execute(data_cleaning.EXPERIMENT, settings))
    records, summary = results.read(folder), results.read_summary(folder)
    accuracies = {
        r.labels["series"]: r.value for r in records if r.metric == "test_accuracy"
    }  # the last of each series
    assert accuracies["no cleaning"] + 0.05 < accuracies["cleaning, trained anew"]
    assert accuracies["no cleaning"] < accuracies["clean labels only"]
    curve = [r for r in records if r.labels["series"] == "cleaning" and r.metric == "auc"]
    assert curve[0].value == 0.5  # equal weights
    assert curve[-1].value > 0.9
    assert curve[-1].step == settings.num_steps
    shares = [r for r in records if r.metric.startswith("share[")]
    assert len(shares) == 2 * data_cleaning.BINS
    for name in ("clean", "corrupted"):
        total = sum(r.value for r in shares if r.labels["series"] == name)
        np.testing.assert_allclose(total, 1)
    gain, separation, *controls = data_cleaning.claims(summary)
    assert {c.holds for c in (gain, separation, *controls)} == {None}  # one seed cannot decide
    assert summary.find("gain", series="cleaning, trained anew")["mean"] >= 0.05
    assert summary.find("auc", series="cleaning")["mean"] > 0.9
    assert "gain" in capsys.readouterr().out
    figure = data_cleaning.draw(records, results.read_json(folder / "config.json"))
    left, right = figure.axes
    assert len(left.lines) == 2 + len(data_cleaning.REFERENCES)  # warm-started, trained anew
    assert len(right.patches) == len(shares)


def test_weights_that_are_not_finite_are_reported(tmp_path):
    settings = dataclasses.replace(SMOKE, out=tmp_path, learning_rate=jnp.nan, seeds=(0,))
    summary = results.read_summary(present(framework.execute(data_cleaning.EXPERIMENT, settings)))
    _, separation, *_ = data_cleaning.claims(summary)
    assert separation.holds is None
    assert "not finite" in separation.ours
