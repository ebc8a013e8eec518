"""``copy_task`` at smoke scale: strings grow, and a string's loss is the problem's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unrollgrad as ug
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import copy_task
from tests.helpers import present
from tests.stored import expect

pytestmark = pytest.mark.experiments


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(copy_task.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(copy_task.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    assert copy_task.claims(summary) == []
    large = summary._replace(about={**summary.about, "config": {"scale": "paper"}})
    claims = copy_task.claims(large)
    assert [claim.holds for claim in claims] == [None] * 4
    assert [claim.ours.endswith("not run") for claim in claims] == [False, True, True, True]
    assert "symbols attempted at the end" in capsys.readouterr().out
    records = results.read(folder)
    lengths = [r.value for r in records if r.metric == "length"]
    assert len(lengths) == 2 * 21
    assert all(1 <= length <= settings.longest for length in lengths)
    assert summary.find("length", estimator="es_single")["mean"] > 1
    expect(
        "copy_task experiment",
        {name: summary.find("inner_steps", estimator=name)["mean"] for name in settings.estimators},
    )


def test_loss_of_an_episode_is_that_of_fresh_strings():
    """J is half the cross-entropy of the repeated half, for any length; other steps add 0."""
    settings = dataclasses.replace(copy_task.SCALES["smoke"], batch_size=500)
    theta = copy_task.begin(settings, "es_single", 0.1, jax.random.key(0)).theta
    theta["out"]["bias"] = jnp.array([0.0, 2.0])  # predicts 1 with 88 %
    theta["out"]["kernel"] = jnp.zeros_like(theta["out"]["kernel"])
    expected = np.log1p(np.exp(2.0)) - 1
    for length in (1, 3):
        problem = copy_task.growing_problem(settings, jnp.int32(length))
        problem = problem._replace(horizon=2 * length)
        assert abs(ug.episode_loss(problem, jax.random.key(1), theta) - expected / 2) < 0.05
        found = copy_task.cross_entropy(settings, jax.random.key(2), theta, jnp.int32(length))
        assert abs(found - expected) < 0.25


def test_an_episode_keeps_its_length():
    settings = copy_task.SCALES["smoke"]
    before = copy_task.growing_problem(settings, jnp.int32(2))
    after = copy_task.growing_problem(settings, jnp.int32(3))
    run = copy_task.begin(settings, "es_single", 0.1, jax.random.key(0))
    state = before.init(jax.random.key(0), run.theta)
    first, other = (
        problem.step(jax.random.key(1), run.theta, state, jnp.int32(2))[1]
        for problem in (before, after)
    )
    assert first == other > 0  # step 2 is the first of the repeated half
    fresh = after.init(jax.random.key(0), run.theta)
    assert after.step(jax.random.key(1), run.theta, fresh, jnp.int32(2))[1] == 0
