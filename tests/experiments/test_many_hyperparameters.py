"""``many_hyperparameters`` at smoke scale, its optimizer, its widths and its random search."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import unrollgrad as ug
from experiments._framework import experiment as framework
from experiments._framework import results
from experiments.estimators import many_hyperparameters as many
from tests.helpers import present
from tests.stored import expect

pytestmark = pytest.mark.experiments


def test_smoke(tmp_path, capsys):
    settings = dataclasses.replace(many.SCALES["smoke"], out=tmp_path)
    folder = present(framework.execute(many.EXPERIMENT, settings))
    summary = results.read_summary(folder)
    claims = many.claims(summary)
    assert [claim.holds for claim in claims] == [None] * 4
    assert [claim.ours.endswith("not run") for claim in claims] == [False, True, True, True]
    assert "J at the end" in capsys.readouterr().out
    records = results.read(folder)
    for name in (*settings.estimators, "random_search"):
        assert summary.find("inner_steps", estimator=name)["mean"] == settings.budget
    first = next(r.value for r in records if r.metric == "loss")
    found = {name: summary.find("loss", estimator=name)["mean"] for name in ("random_search",)}
    low, high = settings.search_ranges[0]
    assert summary.find("lowest_rate", estimator="random_search")["mean"] == pytest.approx(low)
    assert summary.find("highest_rate", estimator="random_search")["mean"] == pytest.approx(high)
    assert summary.find("adam_rate", estimator="es_single")["mean"] == pytest.approx(0.1)
    expect("many_hyperparameters experiment", {"before": first, **found})


def test_momentum_of_each_tensor_is_that_of_optax():
    params = [{"bias": jnp.zeros(2), "kernel": jnp.ones((3, 2))}, {"bias": jnp.ones(1)}]
    rates, momenta = (0.1, 0.02, 0.3), (0.9, 0.5, 0.1)
    ours = many.sgd_by_tensor(
        jnp.log(jnp.array(rates)), jax.scipy.special.logit(jnp.array(momenta))
    )
    leaves, tree = jax.tree.flatten(params)
    theirs = [optax.sgd(r, momentum=m) for r, m in zip(rates, momenta, strict=True)]
    state, states = ours.init(params), [o.init(x) for o, x in zip(theirs, leaves, strict=True)]
    for i in range(3):
        grads = [jnp.sin(i + x) for x in leaves]
        got, state = ours.update(tree.unflatten(grads), state)
        updates = [o.update(g, s) for o, g, s in zip(theirs, grads, states, strict=True)]
        wanted, states = zip(*updates, strict=True)
        for mine, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(mine, want, rtol=1e-5)


def test_units_beyond_the_share_are_not_used():
    width = 8
    settings = dataclasses.replace(many.SCALES["smoke"], width=width)
    theta = many.draw_theta(jax.random.key(0))
    params = many.make_problem(settings).init(jax.random.key(1), theta).params
    share = jnp.full(many.LAYERS, jax.scipy.special.logit(0.55))  # 4 of 8 units
    x = jax.random.normal(jax.random.key(2), (5, 64))

    def changed(unit):
        second = {**params[1], "bias": params[1]["bias"].at[unit].add(1.0)}
        other = many.logits([params[0], second, *params[2:]], share, x)
        return bool(jnp.any(other != many.logits(params, share, x)))

    assert [changed(unit) for unit in range(width)] == 4 * [True] + 4 * [False]


def test_thetas_are_drawn_as_published():
    thetas = jax.vmap(many.draw_theta)(jax.random.split(jax.random.key(0), 500))
    assert sum(x.size for x in jax.tree.leaves(thetas)) == 500 * 29
    rates = np.exp(thetas["log_rate"])
    momenta, shares = map(jax.nn.sigmoid, (thetas["momentum_logit"], thetas["share_logit"]))
    for values, low, high in ((rates, 1e-4, 1e-2), (momenta, 0.01, 0.9), (shares, 0.2, 0.8)):
        assert low * 0.999 < np.min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < np.max(values) < high * 1.001
    assert abs(np.median(rates) / 1e-3 - 1) < 0.1  # log-uniform


def test_random_search_keeps_the_best():
    """The problem's loss is theta's first rate."""
    problem = ug.UnrolledProblem(
        init=lambda key, theta: jnp.zeros(()),
        step=lambda key, theta, state, t: (state, theta["log_rate"][0]),
        horizon=1,
    )
    found = many.random_search(problem, 40, (1e-3, 1.0), jax.random.key(0))
    assert [tried for tried, _ in found] == list(range(2, 41, 2))
    rates = [float(theta["log_rate"][0]) for _, theta in found]
    assert rates == sorted(rates, reverse=True)
    assert np.log(1e-3) < rates[-1] < np.log(1e-3) + 0.5


def test_random_search_chooses_its_range():
    """The problem's loss is least where the first rate is 0.03."""
    problem = ug.UnrolledProblem(
        init=lambda key, theta: jnp.zeros(()),
        step=lambda key, theta, state, t: (
            state,
            1 + jnp.square(theta["log_rate"][0] - jnp.log(0.03)),
        ),
        horizon=1,
    )
    ranges = ((1e-4, 1e-2), (1e-2, 0.1), (0.1, 1.0))
    settings = dataclasses.replace(many.SCALES["smoke"], search_ranges=ranges, tuning_runs=2)
    loss = lambda theta: ug.episode_loss(problem, jax.random.key(0), theta)  # noqa: E731
    assert many._best_range(settings, problem, 40, loss) == (1e-2, 0.1)
