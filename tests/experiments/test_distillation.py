"""``distillation`` at smoke scale: the images compared, and the learned images' gain."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.bilevel import data_cleaning, distillation
from tests.helpers import present

pytestmark = pytest.mark.experiments

SMOKE = distillation.SCALES["smoke"]


def test_the_images_compared_are_of_their_digits():
    train, _ = data_cleaning.digits(jax.random.key(2), 300)
    images, labels = np.asarray(train.images), np.asarray(train.labels)
    means = distillation.class_means(train)
    for label in range(10):
        np.testing.assert_allclose(means[label], images[labels == label].mean(0), atol=1e-5)
    draws = [distillation.random_images(jax.random.key(i), train) for i in range(3)]
    for drawn in draws:
        for label, image in enumerate(drawn):
            assert (images[labels == label] == np.asarray(image)).all(1).any()
    assert not np.array_equal(draws[0], draws[1])


def test_both_solvers_descend():
    train, _ = data_cleaning.digits(jax.random.key(0), 300)
    for solver in SMOKE.solvers:
        result = distillation.distil(SMOKE, train, solver)
        assert result.outer_losses[-1] < 0.6 * jnp.log(10.0)
        np.testing.assert_allclose(result.outer_losses[0], jnp.log(10.0), rtol=0.01)  # zero weights


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(SMOKE, out=tmp_path)
    folder = present(framework.execute(distillation.EXPERIMENT, settings))
    records, summary = results.read(folder), results.read_summary(folder)
    for name in settings.solvers:
        gain = summary.find("over_random", series=f"{name}, gain")
        assert gain["mean"] > 0.1
        curve = [r for r in records if r.labels["series"] == name and r.metric == "accuracy"]
        assert curve[-1].step == settings.num_steps
    pixels = [r for r in records if r.metric == "pixel"]
    assert len(pixels) == 3 * 10 * 64
    means = [r.value for r in pixels if r.labels["series"] == "class means"]
    assert 0 <= min(means) < max(means) <= 1
    claims = distillation.claims(summary)
    assert len(claims) == 4
    assert all(claim.holds is None for claim in claims)  # one seed cannot decide
    assert "over_random" in capsys.readouterr().out
    figure = distillation.draw(records, results.read_json(folder / "config.json"))
    images = [axis.images[0].get_array() for axis in figure.axes if axis.images]
    assert len(images) == 50  # three sets of ten, and two without their mean
    assert all(image.shape == (8, 8) and 0 <= image.min() < image.max() <= 1 for image in images)
